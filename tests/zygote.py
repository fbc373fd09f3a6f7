"""Ranks that begin with the modules loaded: a process that has imported them once, and forks for every rank.

A fresh interpreter takes 5 s of a core until Megatron is there, which was a third of the suite's time. Ranks of both parities
come from processes of their own, whose hashes differ, so that what goes through a set in its order differs between ranks as
between interpreters. Not for CUDA: its context does not survive a fork.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
_LOCK = threading.Lock()
"""Tests that start several jobs at once ask from threads."""
MODULES = ("megatron_glmv.rl.command", "tests.model.oracle", "torch._dynamo")


class Forked:
    """A rank, with the part of `subprocess.Popen` that its starter needs."""

    def __init__(self, zygote: subprocess.Popen[str], process: int) -> None:
        self._zygote, self.pid = zygote, process
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None: it runs."""
        if self.returncode is None:
            self.returncode = _ask(self._zygote, {"poll": self.pid})["returncode"]
        return self.returncode

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for the end; returns the exit code."""
        if self.returncode is None:
            self.returncode = _ask(self._zygote, {"wait": self.pid})["returncode"]
        return self.returncode


def fork(parity: int, module: str, function: str, words: list[Any], environment: dict[str, str], output: Path) -> Forked:
    """Call ``module.function(*words)`` in a new process; it never returns there.

    Args:
        parity: which of the two processes forks; both load at the same time.
        module: that holds `function`.
        function: by name.
        words: its arguments, which JSON can hold.
        environment: the whole of it; its PYTHONPATH is the whole path of modules.
        output: file for standard output and error.
    """
    with _LOCK:
        zygote = [_start(number) for number in range(2)][parity % 2]
    call = {"module": module, "function": function, "words": words}
    place = {"environment": environment, "folder": str(Path.cwd()), "output": str(output)}
    return Forked(zygote, _ask(zygote, call | place)["process"])


@cache
def _start(parity: int) -> subprocess.Popen[str]:
    """One of the two processes; it ends with this one."""
    zygote = subprocess.Popen(
        [sys.executable, "-m", "tests.zygote"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert zygote.stdin is not None
    atexit.register(zygote.stdin.close)
    return zygote


def _ask(zygote: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any]:
    assert zygote.stdin is not None and zygote.stdout is not None
    with _LOCK:
        zygote.stdin.write(json.dumps(request) + "\n")
        zygote.stdin.flush()
        answer = zygote.stdout.readline()
    assert answer, f"the process that forks ranks has ended with {zygote.wait()}"
    return json.loads(answer)


def _serve() -> None:
    """Load the modules, then answer requests, one JSON a line, until the asking process ends."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what modules print is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in MODULES:
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a thread, which a fork would leave behind"
    gc.collect()
    gc.freeze()  # so that ranks neither look at the modules again nor copy their pages
    for line in requests:
        request = json.loads(line)
        if "module" in request:
            answer: dict[str, int | None] = {"process": os.fork()}
            if not answer["process"]:
                _become(request, requests.fileno(), answers.fileno())
        else:
            process, status = os.waitpid(request.get("poll") or request["wait"], os.WNOHANG if "poll" in request else 0)
            answer = {"returncode": os.waitstatus_to_exitcode(status) if process else None}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _become(request: dict[str, Any], *inherited: int) -> None:
    """Be the process that was asked for."""
    for number in inherited:
        os.close(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:] = request["environment"]["PYTHONPATH"].split(os.pathsep)
    os.chdir(request["folder"])
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, request["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)):
        opened = os.open(path, flags, 0o666)
        os.dup2(opened, number)
        os.close(opened)
    os.dup2(1, 2)
    getattr(importlib.import_module(request["module"]), request["function"])(*request["words"])
    os._exit(0)


if __name__ == "__main__":
    _serve()
