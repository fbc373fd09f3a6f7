"""Asking a judge or a reward model: retries with growing waits, a rest for one that is down, cache, meter.

The judge and the reward model share it, so both follow the same rules. The bearer token is in no cache key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from megatron_glmv.config.rewards import EndpointConfig, HttpConfig
from megatron_glmv.rl import http

T = TypeVar("T")


class ServerFailed(Exception):
    """A server did not answer, or not with what was asked, after all tries.

    Attributes:
        reason: code of the masked reward: down or rubbish.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


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
    """Failed tries of one endpoint since its last reply, of questions that have used all of theirs; until when it rests."""

    def __init__(self) -> None:
        self.failures = 0
        self.down_until = 0.0


class ServerClient:
    """Sends JSON and reads JSON.

    Args:
        config: time limit, retries, cache.
        waits: whether a question waits at an endpoint that rests as long as its tries would take, or fails at once.
    """

    def __init__(self, config: HttpConfig, *, waits: bool = True) -> None:
        self.meter = http.Meter()
        self._config, self._waits = config, waits
        self._cache = ReplyCache(config.cache) if config.cache is not None else None
        self._health: dict[str, _Health] = {}
        self._lock = threading.Lock()
        self._http = http.JsonClient(config.concurrency, self.meter)

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
        down = 0
        for number in range(self._config.retries + 1):
            try:
                self._check_rest(endpoint)
                down += 1  # until it replies
                self.meter.add(retries=min(number, 1))
                timeout_s, token_env = self._config.timeout_s, endpoint.token_env
                reply = self._http.exchange(endpoint.url, path, body, timeout_s=timeout_s, token_env=token_env)
                self.meter.add_tokens(reply, endpoint.price_in, endpoint.price_out)
                value = _read(reply, read)
            except http.Failure as failure:
                if failure.reason != "down":
                    self._note_reply(endpoint)
                    down = 0
                if not failure.again or number == self._config.retries:
                    self._note_failure(endpoint, down)
                    self.meter.add(failures=1)
                    raise ServerFailed(failure.reason, f"{endpoint.url}: {failure}") from None
                http.wait_before_retry(number, self._config.backoff_s, failure.wait_s)
            else:
                self._note_reply(endpoint)
                return reply, value
        raise AssertionError("unreachable")

    def _check_rest(self, endpoint: EndpointConfig) -> None:
        with self._lock:
            health = self._health.setdefault(endpoint.url, _Health())
            if time.monotonic() < health.down_until:
                raise http.Failure("down", f"left alone after {health.failures} failures in a row", again=self._waits)

    def _note_reply(self, endpoint: EndpointConfig) -> None:
        with self._lock:
            self._health[endpoint.url].failures = 0

    def _note_failure(self, endpoint: EndpointConfig, tries: int) -> None:
        """A question has used all its tries. Those of others count when theirs are: many that are under way fail together."""
        with self._lock:
            health = self._health[endpoint.url]
            health.failures += tries
            if tries and health.failures >= self._config.down_after and time.monotonic() >= health.down_until:
                health.down_until = time.monotonic() + self._config.cooldown_s

    def close(self) -> None:
        """Close all connections."""
        self._http.close()


def check_tokens(endpoints: Iterable[EndpointConfig]) -> None:
    """Stop before the first question if a token is not there.

    Raises:
        ConfigError: an environment variable that `token_env` names is not set.
    """
    http.check_tokens((endpoint.url, endpoint.token_env) for endpoint in endpoints)


def _read(reply: Any, read: Callable[[Any], T]) -> T:
    try:
        return read(reply)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise http.Failure("rubbish", f"the reply cannot be used ({str(error)[:120]})") from None
