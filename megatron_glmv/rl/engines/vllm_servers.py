"""The servers behind the vLLM engine: which are there, who gets the next request, and what becomes of one that fails.

A server that is gone, that does not load new weights, or that serves others than the run's, is left out until new weights are
sent; its requests go to the others. A request that fails for another reason is tried again and then given up: its answers are
left out and counted. What every request would meet (no server, a missing option) ends the run with one line.

Source: vLLM 0.32.0, entrypoints/rl/online/api_router.py and entrypoints/serve (paths), measured answers of a running server.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from megatron_glmv.config.engines import VllmConfig
from megatron_glmv.rl import http
from megatron_glmv.rl.engines.engine import EngineDown, EngineError
from megatron_glmv.rl.engines.vllm_wire import RequestFailed

T = TypeVar("T")
LOG = logging.getLogger(__name__)
TESTED = "0.32"
"""Version of vLLM that the tests run against."""
START = "examples/vllm_server.sh"
MAX_REPLY_BYTES = 1_000_000_000
CONTROL_S = 60.0
"""Longest wait for what is neither sampling nor loading."""
_HINTS = {
    401: "set token_env to the environment variable that holds its --api-key",
    403: "start it with --enable-scale-out",
    404: f"start it with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out, and the model's name as in `model` ({START} does)",
}


class ServerGone(Exception):
    """A server that no request should go to any more.

    Attributes:
        answered: it is there, and says that it failed.
    """

    def __init__(self, reason: str, *, answered: bool = False) -> None:
        super().__init__(reason)
        self.answered = answered


class Servers:
    """The addresses of a configuration.

    Args:
        config: addresses, limits on time and concurrency, retries.

    Attributes:
        meter: requests, retries, failures, tokens and seconds since the start.
        max_tokens: prompt and answer together, of the server with the smallest context.

    Raises:
        ConfigError: the environment variable of the token is not set.
    """

    def __init__(self, config: VllmConfig) -> None:
        http.check_tokens((url, config.token_env) for url in config.addresses)
        self.meter = http.Meter()
        self.max_tokens = 0
        self._config = config
        self._http = http.JsonClient(config.concurrency + len(config.addresses), self.meter)
        self._lock = threading.Lock()
        self._under_way: dict[str, int] = {}
        self._out: dict[str, str] = {}

    @property
    def live(self) -> Sequence[str]:
        """Addresses of the servers that get requests."""
        with self._lock:
            return tuple(self._under_way)

    def find(self) -> None:
        """Look at all addresses anew.

        Raises:
            EngineDown: nobody answers.
            EngineError: a server does not serve the policy.
        """
        with self._lock:
            self._under_way, self._out = dict.fromkeys(self._config.addresses, 0), {}
        contexts = []
        for url in self._config.addresses:
            try:
                contexts.append(self.order(url, "/v1/models", None, self._read_context))
                version = self.order(url, "/version", None, lambda reply: str(reply["version"]))
            except ServerGone as gone:
                self.leave_out(url, str(gone))
                continue
            if not version.startswith(TESTED):
                LOG.warning("%s: vLLM %s; this engine is tested with %s", url, version, TESTED)
        self.check_any()
        self.max_tokens = min(contexts)

    def _read_context(self, reply: Any) -> int:
        served = {model["id"]: model for model in reply["data"]}
        if self._config.model not in served:
            names = ", ".join(served)
            raise EngineError(f"serves {names}; start it with --served-model-name {self._config.model}, or set `model`")
        return int(served[self._config.model]["max_model_len"])

    def check_any(self) -> None:
        """Raise where no server is left.

        Raises:
            EngineDown: names each of them and why.
        """
        with self._lock:
            if not self._under_way:
                why = "; ".join(f"{url}: {reason}" for url, reason in self._out.items())
                raise EngineDown(f"no vLLM server is left ({why}); start them ({START}) and resume from the last checkpoint")

    def check_health(self) -> None:
        """Ask every server whether it can answer, and leave out those that cannot.

        Raises:
            EngineDown: none is left.
        """
        for url in self.live:
            if not self._is_alive(url):
                self.leave_out(url, "its engine does not answer")
        self.check_any()

    def leave_out(self, url: str, reason: str) -> None:
        """Give a server nothing more, until `find`."""
        with self._lock:
            known = self._under_way.pop(url, None) is not None
            self._out.setdefault(url, reason)
        if known:
            LOG.warning("%s is left out until new weights are sent: %s", url, reason)

    def order(self, url: str, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], T], *, long: bool = False) -> T:
        """Ask one server something that must not fail, once.

        Args:
            url: whom.
            path: added to the address.
            body: to post; None: nothing is posted.
            read: what is wanted of the reply.
            long: wait as long as for answers.

        Raises:
            ServerGone: nothing answers at the address, the connection broke off, or the server failed itself.
            EngineError: it refuses, or says something else than was asked for: another server of its kind would, too.
        """
        timeout_s = self._config.timeout_s if long else CONTROL_S
        try:
            reply = self._http.exchange(url, path, body, timeout_s=timeout_s, token_env=self._config.token_env)
            return read(reply)
        except http.Failure as failure:
            if failure.refused:
                raise ServerGone(str(failure)) from None
            if failure.reason == "down" and failure.again:
                raise ServerGone(f"{path}: {explain(failure)}", answered=failure.status > 0) from None
            raise EngineError(f"{url}{path}: {explain(failure)}") from None
        except EngineError as error:
            raise EngineError(f"{url}: {error}") from None
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise EngineError(f"{url}{path}: the reply cannot be used ({str(error)[:120]})") from None

    def ask(self, path: str, body: Mapping[str, Any], read: Callable[[Any], T], near: str | None = None) -> tuple[T, str]:
        """Let some server answer a request.

        Args:
            path: added to its address.
            body: to post.
            read: what is wanted of the reply; raises ValueError where another try may help, ServerGone where the server must
                not be asked again, RequestFailed where nothing helps.
            near: the server that has read the prompt already, which is asked if it is still there.

        Returns:
            what `read` made of the reply, and who answered.

        Raises:
            RequestFailed: no usable reply after all tries.
            EngineDown: no server is left.
            EngineError: one lacks an option that every request needs.
        """
        while True:
            url = self._take(near)
            try:
                return self._try(url, path, body, read), url
            except ServerGone as gone:
                self.leave_out(url, str(gone))
            finally:
                self._give_back(url)

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def _take(self, near: str | None) -> str:
        """The server with the fewest requests, or `near`."""
        self.check_any()
        with self._lock:
            if not self._under_way:
                raise EngineDown("no vLLM server is left")
            url = near if near in self._under_way else min(self._under_way, key=lambda one: self._under_way[one])
            self._under_way[url] += 1
            return url

    def _give_back(self, url: str) -> None:
        with self._lock:
            if url in self._under_way:
                self._under_way[url] = max(0, self._under_way[url] - 1)

    def _try(self, url: str, path: str, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        for number in range(self._config.retries + 1):
            try:
                reply = self._http.exchange(
                    url,
                    path,
                    body,
                    timeout_s=self._config.timeout_s,
                    token_env=self._config.token_env,
                    max_bytes=MAX_REPLY_BYTES,
                )
                self.meter.add_tokens(reply)
                return _read(reply, read)
            except http.Failure as failure:
                last = failure
                if failure.status in _HINTS:
                    raise EngineError(f"{url}{path}: {explain(failure)}") from None
                if not failure.again:
                    break
            if number < self._config.retries:
                self.meter.add(retries=1)
                http.wait_before_retry(number, self._config.backoff_s, last.wait_s)
        if last.refused or (last.reason == "down" and last.again and not self._is_alive(url)):
            raise ServerGone(explain(last))
        raise RequestFailed(f"{url}: {explain(last)}")

    def _is_alive(self, url: str) -> bool:
        """Whether the server says that its engine runs; it says so while it is busy, too."""
        try:
            self._http.exchange(url, "/health", None, timeout_s=CONTROL_S, token_env=self._config.token_env)
        except http.Failure:
            return False
        return True


def _read(reply: Any, read: Callable[[Any], T]) -> T:
    try:
        return read(reply)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise http.Failure("rubbish", f"the reply cannot be used ({str(error)[:120]})") from None


def explain(failure: http.Failure) -> str:
    """A failure in one line: what happened, what the server says of it, and what to do where that is known."""
    said = _message(failure.text)
    hint = _HINTS.get(failure.status, "")
    return str(failure) + (f" ({said})" if said else "") + (f"; {hint}" if hint else "")


def _message(text: str) -> str:
    """The message in an error of vLLM's, or the beginning of another text."""
    try:
        tree = json.loads(text)
        found = tree.get("error", tree.get("detail", text)) if isinstance(tree, dict) else text
        found = found.get("message", found) if isinstance(found, dict) else found
    except (ValueError, RecursionError):
        found = text
    return " ".join(str(found).split())[:300]
