"""Processes that run the verifiers, each with a time limit an answer; a stuck or dead one is replaced.

A thread drives each process, so that the trainer can go on. What a process could not say in time is masked with reason timeout,
and an answer over which a process dies with reason error; neither is ever a reward.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from types import TracebackType
from typing import Any, Self

from megatron_glmv.config.rewards import RewardsConfig
from megatron_glmv.rl.rewards.verifiers.base import Question
from megatron_glmv.rl.rewards.worker import unpack
from megatron_glmv.rl.types import Reward, Task

START_TIMEOUT_S = 60.0
COMMAND = (sys.executable, "-m", "megatron_glmv.rl.rewards.worker")
_CHUNK = 65_536
_Job = tuple[Task, str, "Future[Reward | Question]"]


class WorkerFailed(RuntimeError):
    """A process of the pool does not start."""


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, config: RewardsConfig, command: tuple[str, ...]) -> None:
        self._config = config
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def ask(self, task: Task, text: str) -> Reward | Question:
        """The outcome of one answer; masked where the process is too slow or dies."""
        fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
        try:
            tree = {"task": {**fields, "options": dict(task.options)}, "text": text}
            line = json.dumps(tree, default=_as_json).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            return Reward(None, None, "reference", f"{task.key}: {error}")
        process = self._started()
        deadline = time.monotonic() + self._config.timeout_s
        try:
            self._write(process, line, deadline)
            return unpack(json.loads(self._line(process, deadline)))
        except TimeoutError:
            self.stop()
            return Reward(None, None, "timeout", f"{task.key}: no verdict within {self._config.timeout_s:g} s")
        except (OSError, EOFError, ValueError) as error:
            self.stop()
            return Reward(None, None, "error", f"{task.key}: the verifier's process ended ({type(error).__name__})")

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        secrets = _token_names(self._config)
        environment = {name: value for name, value in os.environ.items() if name not in secrets}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(path or "." for path in sys.path)
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0)
        self._process, self._rest = process, b""
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            self._write(process, self._config.model_dump_json().encode() + b"\n", deadline)
            if self._line(process, deadline) != b"ready":
                raise EOFError
        except (OSError, EOFError) as error:
            self.stop()
            raise WorkerFailed(f"a verifier's process does not start: {' '.join(self._command)}") from error
        os.set_blocking(process.stdin.fileno(), False)  # type: ignore[union-attr]
        return process

    def _write(self, process: subprocess.Popen[bytes], data: bytes, deadline: float) -> None:
        pipe = process.stdin.fileno()  # type: ignore[union-attr]
        view = memoryview(data)
        while view:
            _wait(pipe, select.POLLOUT, deadline)
            view = view[os.write(pipe, view[:_CHUNK]) :]

    def _line(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        pipe = process.stdout.fileno()  # type: ignore[union-attr]
        while b"\n" not in self._rest:
            _wait(pipe, select.POLLIN, deadline)
            data = os.read(pipe, _CHUNK)
            if not data:
                raise EOFError
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def kill(self) -> None:
        """From another thread: end the process under whoever waits for it."""
        process = self._process
        if process is not None:
            process.kill()

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.wait()


def _wait(pipe: int, event: int, deadline: float) -> None:
    """Until a pipe is ready. poll, since select refuses descriptors above 1023, which a trainer may well have."""
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
        raise TimeoutError


def _as_json(value: Any) -> Any:
    """References may be arrays."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} in a task")


def _token_names(config: RewardsConfig) -> set[str]:
    endpoints = [
        *(config.judge.endpoints if config.judge else ()),
        *([config.reward_model.endpoint] if config.reward_model else ()),
    ]
    return {endpoint.token_env for endpoint in endpoints if endpoint.token_env}


class VerifierPool:
    """Processes that run gates and verifiers.

    Args:
        config: rewards; `workers`, `timeout_s` and `memory_gb` are the pool's.
        command: how a process is started.
    """

    def __init__(self, config: RewardsConfig, command: tuple[str, ...] = COMMAND) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._workers = [_Worker(config, command) for _ in range(config.workers)]
        self._threads = [
            Thread(target=self._drive, args=(worker,), name=f"verifier-{number}", daemon=True)
            for number, worker in enumerate(self._workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, task: Task, text: str, done: Callable[[Future[Reward | Question]], object] | None = None
    ) -> Future[Reward | Question]:
        """Judge one response; `done` is called in the pool's thread when it is."""
        future: Future[Reward | Question] = Future()
        if done is not None:
            future.add_done_callback(done)
        self._jobs.put((task, text, future))
        return future

    def _drive(self, worker: _Worker) -> None:
        while (job := self._jobs.get()) is not None:
            task, text, future = job
            try:
                future.set_result(worker.ask(task, text))
            except Exception as error:  # noqa: BLE001 - handed to whoever waits for the result
                future.set_exception(error)
        worker.stop()

    def close(self, *, finish: bool = True) -> None:
        """End the processes; `finish`: after what is queued, else at once, and what was queued is cancelled."""
        while not finish and not self._jobs.empty():
            job = self._jobs.get()
            if job is not None:
                job[2].cancel()
        for _ in self._threads:
            self._jobs.put(None)
        for worker in self._workers:
            if not finish:
                worker.kill()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(finish=kind is None)
