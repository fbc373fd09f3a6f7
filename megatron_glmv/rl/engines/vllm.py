"""The engine that asks vLLM servers over plain HTTP; vLLM itself is not imported.

Rank 0 brings new weights to the servers; every rank sends the requests for its own prompts. An answer whose thinking is closed
by force is continued in a second request, which sends the prompt, what was sampled and what was inserted.

Every reply is compared with what was asked: the ids of the prompt, the number of log-probabilities, the version of the weights.
Before the first answers a probe makes sure that log-probabilities are those of the sampling temperature.

Source: vLLM 0.32.0, measured on a running server; what its endpoints are called stands in `vllm_servers` and `vllm_weights`,
how requests and replies look in `vllm_wire`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_glmv.config.engines import VllmConfig
from megatron_glmv.config.model import ModelShape
from megatron_glmv.rl.engines import vllm_weights, vllm_wire
from megatron_glmv.rl.engines.engine import EngineError, Request, Sampling
from megatron_glmv.rl.engines.vllm_servers import START, ServerGone, Servers
from megatron_glmv.rl.engines.vllm_wire import Piece, RequestFailed
from megatron_glmv.rl.force_answer import Writing
from megatron_glmv.rl.types import Rollout

LOG = logging.getLogger(__name__)
PROBE_TEMPERATURE = 0.7


class VllmEngine:
    """Answers from vLLM servers.

    Args:
        shape: the architecture.
        sampling: temperature, nucleus, stop tokens, budgets and how ids become text.
        config: addresses, limits, and how weights reach the servers.
        dtype: of the weights as they are sent.
        max_prompt_tokens: longest prompt; 0: not known.

    Attributes:
        meter: requests, retries, failures, tokens and seconds since the start.

    Raises:
        ConfigError: the environment variable of the token is not set.
    """

    weights_on_every_rank = False

    def __init__(
        self,
        shape: ModelShape,
        sampling: Sampling,
        config: VllmConfig,
        *,
        dtype: torch.dtype = torch.float32,
        max_prompt_tokens: int = 0,
    ) -> None:
        self._shape, self._sampling, self._config = shape, sampling, config
        self._servers = Servers(config)
        self._transport = vllm_weights.DiskTransport(config.weights, shape, dtype)
        self._pool = ThreadPoolExecutor(config.concurrency, "vllm")
        self._probed: set[str] = set()
        self._version: int | None = None
        self._max_prompt_tokens = max_prompt_tokens
        self._warned = False
        self.meter = self._servers.meter
        if sampling.top_p < 1:
            LOG.warning(
                "top_p %g: the servers' log-probabilities are those within the nucleus, the trainer's are not", sampling.top_p
            )

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Bring new weights to all servers that answer; on rank 0 only.

        Raises:
            EngineError: the tensors are not those of the architecture, no server is there that loads them, or one refuses to or
                has no room for the longest answer.
        """
        self._version = None
        self._servers.find()
        self._check_room()
        self._renew(self._transport.send(tensors, version), version)
        self._transport.clean(version)

    def load_folder(self, folder: Path, version: int) -> None:
        """Bring the weights of a Hugging Face folder that the servers see to all of them that answer.

        Raises:
            EngineError: no server is there that loads them, or one refuses to or has no room for the longest answer.
        """
        self._version = None
        self._servers.find()
        self._check_room()
        self._renew(vllm_weights.load_from(folder.absolute()), version)

    def _check_room(self) -> None:
        """See whether the servers' context holds the longest prompt and answer: it would cut long answers, in silence.

        Raises:
            EngineError: it does not even hold the answer.
        """
        room, answer = self._servers.max_tokens, self._sampling.max_tokens
        longest = self._max_prompt_tokens + answer
        if room < answer:
            raise EngineError(
                f"the vLLM servers take {room} tokens, and an answer {answer}: start them with more --max-model-len"
            )
        if room < longest and not self._warned:
            self._warned = True
            LOG.warning(
                "the vLLM servers take %d tokens, and the longest prompt with the longest answer %d, whose end they cut off; "
                "start them with --max-model-len %d, or lower prompts.max_tokens",
                room,
                longest,
                longest,
            )

    def _renew(self, load: vllm_weights.Load, version: int) -> None:
        """Have every server load weights that are ready for it; those that do not are left out."""

        def renew(url: str) -> None:
            try:
                vllm_weights.renew(self._servers, url, load, version)
            except ServerGone as gone:
                self._servers.leave_out(url, str(gone))

        with ThreadPoolExecutor(len(self._config.addresses)) as pool:
            list(pool.map(renew, self._servers.live))
        self._servers.check_any()
        self._probe()
        self._version = version

    def expect_version(self, version: int) -> None:
        """Take note that rank 0 has brought weights of this version; servers with others are left out.

        Raises:
            EngineError: no server has them.
        """
        self._version = None
        self._servers.find()
        for url in self._servers.live:
            try:
                served = vllm_weights.served_version(self._servers, url)
            except ServerGone as gone:
                self._servers.leave_out(url, str(gone))
                continue
            if served != str(version):
                self._servers.leave_out(url, _other_weights(served, version))
        self._servers.check_any()
        self._probe()
        self._version = version

    def check_health(self) -> None:
        """Raise where no weights have come yet, or no server is left that answers."""
        self._need_version()
        self._servers.check_health()

    def close(self) -> None:
        """End the connections; the servers go on."""
        self._pool.shutdown(cancel_futures=True)
        self._servers.close()

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Rollout]]]:
        """Answers to each request, as soon as they are complete.

        A request that a server refuses (too long, a picture that does not decode) and one that fails after all tries has no
        answers, or fewer; a line in the log names its prompt.

        Raises:
            EngineError: no server is left, or none was given weights.
        """
        version = self._need_version()
        round_ = _Round(self._servers, self._pool, self._shape, self._sampling, self._config, version)
        yield from round_.answers(requests)

    def _need_version(self) -> int:
        if self._version is None:
            raise EngineError("the vLLM servers have no complete weights of this run; update_weights comes first")
        return self._version

    def _probe(self) -> None:
        """See once of every server that its log-probabilities are those of the sampling temperature.

        Raises:
            EngineError: they are not.
        """
        token = self._sampling.stop_tokens[0] if self._sampling.stop_tokens else 0
        for url in self._servers.live:
            if url in self._probed:
                continue
            warm, cold = (vllm_wire.probe_body(self._config.model, token, heat) for heat in (1.0, PROBE_TEMPERATURE))
            try:
                plain = self._servers.order(url, vllm_wire.GENERATE, warm, vllm_wire.read_probe)
                found = self._servers.order(url, vllm_wire.GENERATE, cold, vllm_wire.read_probe)
                kind = vllm_wire.judge_probe(plain, found, PROBE_TEMPERATURE)
            except ServerGone as gone:
                self._servers.leave_out(url, str(gone))
                continue
            except ValueError as error:
                raise EngineError(f"{url}: {error}") from None
            if kind != "processed":
                told = {"raw": "log-probabilities of temperature 1", "logits": "logits"}[kind]
                raise EngineError(f"{url}: reports {told}; start it with --logprobs-mode processed_logprobs ({START} does)")
            self._probed.add(url)
        self._servers.check_any()


def _other_weights(served: object, version: int) -> str:
    return f"serves weights {served} and not {version}: it was started again, or another run uses it"


@dataclass
class _Asked:
    """A request on its way: what is known of its answers, and which server has read the prompt."""

    place: int
    request: Request
    shape: ModelShape
    open: int
    complete: dict[int, Writing] = field(default_factory=dict)
    server: str | None = None

    @cached_property
    def tokens(self) -> list[int]:
        """The prompt with its placeholders collapsed."""
        return vllm_wire.collapse(self.request.prompt, self.shape)

    @cached_property
    def parts(self) -> list[dict[str, str]]:
        """Its pictures and videos."""
        return [vllm_wire.upload(file) for file in self.request.prompt.files]


@dataclass(frozen=True)
class _Job:
    """One request to a server: the first piece of several answers, or a further one of a single answer."""

    asked: _Asked
    answers: range
    writing: Writing | None = None


class _Round:
    """One call of `generate`: jobs that wait, the pool's threads that do them, and what has become of every request."""

    def __init__(
        self,
        servers: Servers,
        pool: ThreadPoolExecutor,
        shape: ModelShape,
        sampling: Sampling,
        config: VllmConfig,
        version: int,
    ) -> None:
        self._servers, self._pool, self._shape = servers, pool, shape
        self._sampling, self._config, self._version = sampling, config, version
        self._placeholders = {shape.tokens.image, shape.tokens.video}
        self._first: deque[_Job] = deque()
        self._further: deque[_Job] = deque()
        self._done: queue.SimpleQueue[_Asked | Exception] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stopped = False

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Rollout]]]:
        """The answers to each request, in the order in which they are complete."""
        for place, request in enumerate(requests):
            asked = _Asked(place, request, self._shape, request.num_answers)
            step = self._config.answers_per_request
            chunks = [range(start, min(start + step, asked.open)) for start in range(0, asked.open, step)]
            self._first.extend(_Job(asked, chunk) for chunk in chunks)
            if not chunks:
                self._done.put(asked)
        for _ in range(len(self._first)):
            self._pool.submit(self._work)
        try:
            for _ in requests:
                done = self._done.get()
                if isinstance(done, Exception):
                    raise done
                writings = [done.complete[answer] for answer in sorted(done.complete)]
                yield done.place, [one.rollout(self._sampling.text(one.tokens), self._version) for one in writings]
        finally:
            self._stopped = True

    def _work(self) -> None:
        """Do one job; those that continue an answer go first, while the server still has its keys and values."""
        with self._lock:
            job = (self._further or self._first).popleft()
        if self._stopped:
            return
        try:
            self._ask(job)
        except RequestFailed as error:
            self._servers.meter.add(failures=1)
            LOG.warning("%s: %d answers are left out: %s", job.asked.request.prompt.task.key, len(job.answers), error)
            self._finish(job.asked, {}, len(job.answers))
        except Exception as error:  # noqa: BLE001  (raised where the answers are read)
            self._stopped = True
            self._done.put(error)

    def _ask(self, job: _Job) -> None:
        asked, sampling = job.asked, self._sampling
        writings = [job.writing or Writing(sampling.rule) for _ in job.answers]
        written, budget = list(writings[0].tokens), writings[0].budget
        body = vllm_wire.request_body(
            self._config.model,
            [*asked.tokens, *written],
            asked.parts,
            sampling,
            count=len(job.answers),
            seed=_seed(asked.request.seed, job.answers.start, len(written)),
            max_tokens=budget,
        )
        expanded = [*asked.request.prompt.tokens.tolist(), *written]

        def read(reply: Any) -> list[Piece]:
            pieces = vllm_wire.read_pieces(reply, expanded, len(job.answers), budget, sampling.stop_tokens)
            for piece in pieces:
                if piece.tokens and piece.versions != {str(self._version)}:
                    raise ServerGone(_other_weights(", ".join(sorted(piece.versions)) or "without a version", self._version))
            return pieces

        pieces, asked.server = self._servers.ask(vllm_wire.GENERATE, body, read, asked.server)
        complete = {}
        for answer, writing, piece in zip(job.answers, writings, pieces, strict=True):
            self._write(writing, piece, len(expanded) - len(written))
            if writing.budget:
                with self._lock:
                    self._further.append(_Job(asked, range(answer, answer + 1), writing))
                self._pool.submit(self._work)
            else:
                complete[answer] = writing
        self._finish(asked, complete, len(complete))

    def _write(self, writing: Writing, piece: Piece, num_prompt: int) -> None:
        """Add a piece to an answer, up to a token that stands for pixels: read back, it would be taken for a picture."""
        budget = writing.budget
        places = (place for place, token in enumerate(piece.tokens) if token in self._placeholders)
        end = next(places, len(piece.tokens))
        cut = end < len(piece.tokens)
        writing.add(piece.tokens[:end], piece.logprobs[:end], stopped=piece.finish == "stop" and not cut)
        if writing.finish is not None:
            return
        if cut or piece.finish == "abort":
            writing.end("abort", given_up=not cut)
        elif len(piece.tokens) < budget or num_prompt + len(writing.tokens) >= self._servers.max_tokens:
            writing.end("length")  # the server's context is full

    def _finish(self, asked: _Asked, complete: dict[int, Writing], count: int) -> None:
        """Note answers that are complete or lost, and hand over the request that has no others."""
        if not count:
            return
        with self._lock:
            asked.complete.update(complete)
            asked.open -= count
            done = not asked.open
        if done:
            asked.__dict__.pop("parts", None)
            self._done.put(asked)


def _seed(request: int, answer: int, num_written: int) -> int:
    """Of the first of some answers; the following ones have the following numbers, however many a request asks for."""
    parts = [request] if not num_written else [request, answer, num_written]
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 2) + (0 if num_written else answer)
