"""A server on loopback that answers as vLLM 0.32.0 was seen to, or as a test tells it to."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Override = Callable[[str, Any, int], "tuple[int, Any] | None"]
VOCABULARY = 384


class FakeVllm:
    """Answers every path that the engine uses; `override(path, body, number of this path's calls)` comes first.

    Port 0 is any that is free.
    """

    def __init__(self, name: str = "policy", max_model_len: int = 1024, port: int = 0) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.override: Override = lambda path, body, number: None
        self.expand: Callable[[list[int]], list[int]] = lambda ids: ids
        self.sample: Callable[[dict, int], list[int]] = draw
        self.version = "default"
        self.paused = False
        self.delay_s = 0.0
        self._closed = False
        self._name, self._context = name, max_model_len
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                self._answer(json.loads(data))

            def _answer(self, body: Any) -> None:
                path = self.path
                if outer._closed:  # connections that were kept open end with the server
                    self.close_connection = True
                    return
                with lock:
                    number = sum(known == path for known, _ in outer.calls)
                    outer.calls.append((path, body))
                    outer.headers.append(dict(self.headers))
                if path == "/inference/v1/generate":
                    time.sleep(outer.delay_s)
                status, reply = outer.override(path, body, number) or outer.reply(path, body)
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode() if reply is not None else b""
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that stopped waiting is part of the tests."""

        self._server = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def reply(self, path: str, body: Any) -> tuple[int, Any]:
        """What the real server says."""
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": self._name, "max_model_len": self._context}]}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return 200, {"success": True, "new_version": self.version}
        if path == "/inference/v1/generate":
            return 200, self.generate(body)
        self.paused = (self.paused and path != "/resume") or path.startswith("/pause")
        fixed = {
            "/version": {"version": "0.32.0"},
            "/weight_info": {"weight_version": self.version},
            "/pause?mode=abort": {"status": "paused"},
            "/resume": {"status": "resumed"},
            "/collective_rpc": {"results": [None]},
            "/reset_prefix_cache": {"success": True},
        }
        empty = ("/health", "/reset_mm_cache", "/reset_encoder_cache")
        return (200, None) if path in empty else (200, fixed[path]) if path in fixed else (404, {"detail": "Not Found"})

    def generate(self, body: dict) -> dict:
        """A reply to a request for answers."""
        params = body["sampling_params"]
        choices = [self._choice(params, self.sample(params, index), index) for index in range(params.get("n", 1))]
        ids = self.expand(body["token_ids"]) if body.get("return_token_ids") else None
        usage = {"prompt_tokens": len(body["token_ids"]), "completion_tokens": sum(len(c["token_ids"]) for c in choices)}
        return {"request_id": "generate-tokens-1", "prompt_token_ids": ids, "usage": usage, "choices": choices}

    def _choice(self, params: dict, tokens: list[int], index: int) -> dict:
        stopped = bool(tokens) and tokens[-1] in params.get("stop_token_ids", ())
        top = [{"token_id": t, "logprob": logprob(t, params["temperature"]), "rank": 1} for t in (50, 51, 52)]
        content = [
            {"token_id": t, "logprob": logprob(t, params["temperature"]), "rank": 1, "top_logprobs": top} for t in tokens
        ]
        spans = [{"version": self.version, "start": 0, "end": len(tokens)}]
        return {
            "index": index,
            "finish_reason": "stop" if stopped else "length",
            "stop_reason": tokens[-1] if stopped else None,
            "token_ids": tokens,
            "weight_versions": spans,
            "logprobs": {"content": content},
        }

    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def asked(self) -> list[dict]:
        """Bodies of the requests for answers, without the two of the probe."""
        return [body for path, body in self.calls if path == "/inference/v1/generate" and "n" in body["sampling_params"]]

    def close(self) -> None:
        self._closed = True
        self._server.shutdown()
        self._server.server_close()


def draw(params: dict, index: int) -> list[int]:
    """Tokens that follow from the seed, none of them special."""
    seed = params["seed"] + index
    return [30 + (seed * 7 + place * 13) % (VOCABULARY - 30) for place in range(params["max_tokens"])]


@cache
def logprob(token: int, temperature: float) -> float:
    """Of a softmax over the vocabulary at a temperature."""
    logits = [-0.002 * one / temperature for one in range(VOCABULARY)]
    return logits[token] - math.log(sum(math.exp(one) for one in logits))
