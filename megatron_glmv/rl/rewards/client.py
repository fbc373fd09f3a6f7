"""Asking a server over HTTP: retries with growing waits, a rest for one that is down, limits on time and size, cache, meter.

The judge and the reward model share it, so both follow the same rules. The bearer token is read from an environment variable
when a request is sent; it is in no message, no cache key and no log.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import httpx

from megatron_glmv.config.base import ConfigError
from megatron_glmv.config.rewards import EndpointConfig, HttpConfig

T = TypeVar("T")
MAX_REPLY_BYTES = 4_000_000
_RETRIED = frozenset((408, 409, 425, 429))
_MAX_WAIT_S = 60.0


class ServerFailed(Exception):
    """A server did not answer, or not with what was asked, after all tries.

    Attributes:
        reason: code of the masked reward: down or rubbish.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _Failure(Exception):
    """One try failed; `wait_s` is what the server asked for."""

    def __init__(self, reason: str, detail: str, *, again: bool = True, wait_s: float = 0.0) -> None:
        super().__init__(detail)
        self.reason, self.again, self.wait_s = reason, again, wait_s


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

    def as_dict(self) -> dict[str, float]:
        """All counts by name."""
        with self._lock:
            return {field.name: getattr(self, field.name) for field in fields(self)}


class ReplyCache:
    """Replies on disk, a file each, named by what was asked. Several processes and machines may share the folder.

    Args:
        folder: made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: str) -> Any | None:
        """The reply kept under `key`, or None; a file that cannot be read counts as none."""
        try:
            return json.loads(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write(self, key: str, reply: Any) -> None:
        """Keep a reply; a full or read-only disk costs the cache, not the answer."""
        path = self._path(key)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as partial:
                json.dump(reply, partial)
            Path(partial.name).replace(path)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"


class _Health:
    """Failures in a row of one endpoint, and until when it is left alone."""

    def __init__(self) -> None:
        self.failures = 0
        self.down_until = 0.0


class ServerClient:
    """Sends JSON and reads JSON.

    Args:
        config: time limit, retries, cache.
    """

    def __init__(self, config: HttpConfig) -> None:
        self.meter = Meter()
        self._config = config
        self._cache = ReplyCache(config.cache) if config.cache is not None else None
        self._health: dict[str, _Health] = {}
        self._lock = threading.Lock()
        limits = httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
        # A proxy from the environment must not see what goes to this machine.
        self._clients = {local: httpx.Client(limits=limits, trust_env=not local) for local in (False, True)}

    def ask(self, endpoint: EndpointConfig, path: str, body: Mapping[str, Any], vote: int, read: Callable[[Any], T]) -> T:
        """Post `body` and read the reply.

        Args:
            endpoint: whom to ask.
            path: added to its address.
            body: JSON to send.
            vote: number of this question among equal ones; part of the cache's key.
            read: what is wanted of the reply's JSON; raises ValueError where the reply cannot be used.

        Raises:
            ServerFailed: no usable reply after all tries.
        """
        key = hashlib.sha256(json.dumps([path, body, vote], sort_keys=True).encode()).hexdigest()
        if self._cache is not None and (kept := self._cache.read(key)) is not None:
            with contextlib.suppress(ValueError):
                value = read(kept)
                self.meter.add(cache_hits=1)
                return value
        reply, value = self._with_retries(endpoint, path, body, read)
        if self._cache is not None:
            self._cache.write(key, reply)
        return value

    def _with_retries(
        self, endpoint: EndpointConfig, path: str, body: Mapping[str, Any], read: Callable[[Any], T]
    ) -> tuple[Any, T]:
        for number in range(self._config.retries + 1):
            self._check_health(endpoint)
            try:
                reply = self._once(endpoint, path, body)
                self._count_tokens(endpoint, reply)
                value = _read(reply, read)
            except _Failure as failure:
                self._note(endpoint, failed=failure.reason == "down")
                if not failure.again or number == self._config.retries:
                    self.meter.add(failures=1)
                    raise ServerFailed(failure.reason, f"{endpoint.url}: {failure}") from None
                self.meter.add(retries=1)
                backoff = self._config.backoff_s * 2**number * (1 + random.random() / 2)
                time.sleep(min(max(backoff, failure.wait_s), _MAX_WAIT_S))
            else:
                self._note(endpoint, failed=False)
                return reply, value
        raise AssertionError("unreachable")

    def _once(self, endpoint: EndpointConfig, path: str, body: Mapping[str, Any]) -> Any:
        """One request: the reply's JSON. The time limit is of the whole exchange, so a server that drips bytes runs into it."""
        timeout_s = self._config.timeout_s
        started = time.monotonic()
        data = bytearray()
        self.meter.add(requests=1)
        try:
            client = self._clients[endpoint.is_loopback]
            content = json.dumps(body).encode()  # in ASCII: half a surrogate pair in a text is no error
            headers = {"Content-Type": "application/json", **_headers(endpoint)}
            with client.stream("POST", endpoint.url + path, content=content, headers=headers, timeout=timeout_s) as response:
                _check_status(response)
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > MAX_REPLY_BYTES:
                        raise _Failure("rubbish", f"a reply of more than {MAX_REPLY_BYTES} bytes")
                    if time.monotonic() - started > timeout_s:
                        raise _Failure("down", f"no whole reply within {timeout_s:g} s")
        except httpx.HTTPError as error:
            raise _Failure("down", type(error).__name__) from None
        finally:
            self.meter.add(seconds=time.monotonic() - started)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise _Failure("rubbish", "the reply is not JSON") from None

    def _count_tokens(self, endpoint: EndpointConfig, reply: Any) -> None:
        usage = reply.get("usage") if isinstance(reply, dict) else None
        counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
        sent, received = (count if isinstance(count, int) and count > 0 else 0 for count in counts)
        cost = (sent * endpoint.price_in + received * endpoint.price_out) / 1e6
        self.meter.add(tokens_in=sent, tokens_out=received, cost=cost)

    def _check_health(self, endpoint: EndpointConfig) -> None:
        with self._lock:
            health = self._health.setdefault(endpoint.url, _Health())
            if time.monotonic() < health.down_until:
                self.meter.add(failures=1)
                raise ServerFailed("down", f"{endpoint.url}: left alone after {health.failures} failures in a row")

    def _note(self, endpoint: EndpointConfig, *, failed: bool) -> None:
        with self._lock:
            health = self._health[endpoint.url]
            health.failures = health.failures + 1 if failed else 0
            if health.failures >= self._config.down_after:
                health.down_until = time.monotonic() + self._config.cooldown_s

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            client.close()


def check_tokens(endpoints: Iterable[EndpointConfig]) -> None:
    """Stop before the first question if a token is not there.

    Raises:
        ConfigError: an environment variable that `token_env` names is not set.
    """
    for endpoint in endpoints:
        if endpoint.token_env and not os.environ.get(endpoint.token_env, "").strip():
            raise ConfigError(f"{endpoint.url}: token_env: the environment variable {endpoint.token_env} is not set")


def _headers(endpoint: EndpointConfig) -> dict[str, str]:
    token = os.environ.get(endpoint.token_env, "").strip() if endpoint.token_env else ""
    return {"Authorization": f"Bearer {token}"} if token else {}


def _check_status(response: httpx.Response) -> None:
    status = response.status_code
    if status == 200:
        return
    again = status >= 500 or status in _RETRIED
    wait = response.headers.get("retry-after", "")
    raise _Failure("down", f"HTTP {status}", again=again, wait_s=float(wait) if wait.isdigit() and len(wait) < 6 else 0.0)


def _read(reply: Any, read: Callable[[Any], T]) -> T:
    try:
        return read(reply)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise _Failure("rubbish", f"the reply cannot be used ({str(error)[:120]})") from None
