"""A real server on loopback that answers as a judge does, or as it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class JudgeServer:
    """Answers every POST with what `reply` makes of its body: a text (the judge's), bytes (sent as they are), or a status."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.reply: Callable[[dict, int], str | bytes | int] = lambda body, number: "VERDICT: CORRECT"
        self.delay_s = 0.0
        self.under_way = self.most_under_way = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.under_way += 1
                    outer.most_under_way = max(outer.most_under_way, outer.under_way)
                time.sleep(outer.delay_s)
                reply = outer.reply(body, number)
                with lock:
                    outer.under_way -= 1
                data = reply if isinstance(reply, bytes) else b"" if isinstance(reply, int) else completion(reply)
                self.send_response(reply if isinstance(reply, int) else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that stopped waiting is part of the tests."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def prompt(self, number: int = -1) -> str:
        return self.bodies[number]["messages"][0]["content"]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def completion(text: str) -> bytes:
    reply = {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
    return json.dumps(reply).encode()


@pytest.fixture
def judge_server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    yield server
    server.close()
