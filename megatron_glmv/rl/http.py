"""One exchange of JSON with a server, with limits on its time and size; what the clients of judges and of engines share.

The bearer token is read from an environment variable when a request is sent; it is in no message and no log.
"""

from __future__ import annotations

import json
import os
import random
import ssl
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import httpx

from megatron_glmv.config.base import ConfigError
from megatron_glmv.config.http import is_loopback

MAX_REPLY_BYTES = 4_000_000
MAX_ERROR_BYTES = 4_000
"""Of the text that goes with an error, what is read."""
CONNECT_S = 10.0
"""Longest wait for a connection; a server that is there takes it at once, however busy it is."""
_RETRIED = frozenset((408, 409, 425, 429))
_MAX_WAIT_S = 60.0


class Failure(Exception):
    """One try failed.

    Attributes:
        reason: down or rubbish.
        again: whether another try may succeed.
        wait_s: what the server asked for.
        status: of HTTP, 0 without a reply.
        text: the beginning of the reply that came with the status, the token taken out.
        refused: nothing answers at the address.
    """

    def __init__(
        self,
        reason: str,
        detail: str,
        *,
        again: bool = True,
        wait_s: float = 0.0,
        status: int = 0,
        text: str = "",
        refused: bool = False,
    ) -> None:
        super().__init__(detail)
        self.reason, self.again, self.wait_s = reason, again, wait_s
        self.status, self.text, self.refused = status, text, refused


@dataclass
class Meter:
    """What asking has cost. Counts since the start; seconds are those of requests, waits left out."""

    requests: int = 0
    retries: int = 0
    failures: int = 0
    cache_hits: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, **amounts: float) -> None:
        """Add to some of the counts."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def add_tokens(self, reply: Any, price_in: float = 0.0, price_out: float = 0.0) -> None:
        """Add what a reply says of its tokens; prices are of a million."""
        usage = reply.get("usage") if isinstance(reply, dict) else None
        counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
        sent, received = (count if isinstance(count, int) and count > 0 else 0 for count in counts)
        self.add(tokens_in=sent, tokens_out=received, cost=(sent * price_in + received * price_out) / 1e6)

    def as_dict(self) -> dict[str, float]:
        """All counts by name."""
        with self._lock:
            return {field.name: getattr(self, field.name) for field in fields(self)}


class JsonClient:
    """Sends JSON and reads JSON, many exchanges at once.

    Args:
        concurrency: connections.
        meter: counts requests and their seconds.
    """

    def __init__(self, concurrency: int, meter: Meter) -> None:
        self._meter = meter
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        # A proxy from the environment must not see what goes to this machine.
        self._clients = {
            local: httpx.Client(limits=limits, trust_env=not local, verify=_certificates()) for local in (False, True)
        }

    def exchange(
        self,
        url: str,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        timeout_s: float,
        token_env: str | None = None,
        max_bytes: int = MAX_REPLY_BYTES,
    ) -> Any:
        """One request: the reply's JSON, None where it is empty.

        The time limit is of the whole exchange, so a server that drips bytes runs into it.

        Args:
            url: address of the server.
            path: added to it.
            body: JSON to post; None: the path is read with GET.
            timeout_s: longest wait.
            token_env: environment variable with the bearer token.
            max_bytes: of the reply.

        Raises:
            Failure: another status than 200, no reply in time, too large a one, or one that is not JSON.
        """
        started = time.monotonic()
        data = bytearray()
        token = os.environ.get(token_env, "").strip() if token_env else ""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        content = json.dumps(body).encode() if body is not None else None  # in ASCII: half a surrogate pair is no error
        method = "GET" if body is None else "POST"
        limits = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S))
        self._meter.add(requests=1)
        try:
            client = self._clients[is_loopback(url)]
            with client.stream(method, url + path, content=content, headers=headers, timeout=limits) as response:
                _check_status(response, token)
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > max_bytes:
                        raise Failure("rubbish", f"a reply of more than {max_bytes} bytes")
                    if time.monotonic() - started > timeout_s:
                        raise Failure("down", f"no whole reply within {timeout_s:g} s")
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Failure("down", type(error).__name__, refused=True) from None
        except httpx.TimeoutException as error:
            raise Failure("down", f"{type(error).__name__} after {timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise Failure("down", type(error).__name__) from None
        finally:
            self._meter.add(seconds=time.monotonic() - started)
        try:
            return json.loads(data) if data else None
        except (ValueError, RecursionError):
            raise Failure("rubbish", "the reply is not JSON") from None

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            client.close()


def wait_before_retry(number: int, backoff_s: float, asked_s: float = 0.0) -> None:
    """Sleep after the try of this number, from 0: twice as long each time, a random half more, or as long as was asked."""
    backoff = backoff_s * 2**number * (1 + random.random() / 2)
    time.sleep(min(max(backoff, asked_s), _MAX_WAIT_S))


def check_tokens(servers: Iterable[tuple[str, str | None]]) -> None:
    """Stop before the first question if a token is not there.

    Args:
        servers: address and the environment variable with its token.

    Raises:
        ConfigError: such a variable is not set.
    """
    for url, token_env in servers:
        if token_env and not os.environ.get(token_env, "").strip():
            raise ConfigError(f"{url}: token_env: the environment variable {token_env} is not set")


@cache
def _certificates() -> ssl.SSLContext:
    """Reading them takes a tenth of a second, so all clients share them."""
    return httpx.create_ssl_context()


def _check_status(response: httpx.Response, token: str) -> None:
    status = response.status_code
    if status == 200:
        return
    text = bytearray()
    for chunk in response.iter_bytes():
        text += chunk
        if len(text) > MAX_ERROR_BYTES:
            break
    shown = bytes(text[:MAX_ERROR_BYTES]).decode("utf-8", errors="replace")
    wait = response.headers.get("retry-after", "")
    raise Failure(
        "down",
        f"HTTP {status}",
        again=status >= 500 or status in _RETRIED,
        wait_s=float(wait) if wait.isdigit() and len(wait) < 6 else 0.0,
        status=status,
        text=shown.replace(token, "***") if token else shown,
    )
