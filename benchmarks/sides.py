"""The two or more sides of a comparison as processes that wait, so that they can run by turns in one and the same minute.

Every process of a side reads one JSON line a question and answers with one. A side that is not asked sleeps on its input.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPLY = "reply "
"""Starts the lines that answer; what libraries print is passed over."""


class Side:
    """One side: `ranks` processes of one script, each with its own threads."""

    def __init__(self, name: str, script: str, arguments: Sequence[str], *, ranks: int = 1, threads: int = 1) -> None:
        """Start the processes.

        Args:
            name: of the side, for tables and messages.
            script: beside this file; its processes end in `answer`.
            arguments: of the script.
            ranks: processes, with torchrun's environment where they are several.
            threads: of each process.
        """
        self.name, self.ranks = name, ranks
        self._processes = []
        port = free_port()
        for rank in range(ranks):
            own = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            if ranks > 1:
                own |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port)}  # fmt: skip
            command = [sys.executable, str(Path(__file__).parent / script), *arguments]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._processes.append(subprocess.Popen(command, env=own, text=True, **pipes))  # type: ignore[call-overload]

    def ask(self, question: str, **details: Any) -> Any:
        """Put a question to every process at once; the answer of the first.

        Raises:
            RuntimeError: a process ended; it has said why on standard error.
        """
        line = json.dumps({"question": question, **details}) + "\n"
        answers = []
        try:
            for process in self._processes:
                process.stdin.write(line)
                process.stdin.flush()
            for process in self._processes:
                found = next((text for text in process.stdout if text.startswith(REPLY)), None)
                if found is None:
                    raise BrokenPipeError
                answers.append(json.loads(found.removeprefix(REPLY)))
        except BrokenPipeError:
            raise RuntimeError(f"{self.name}: a process ended before it answered {question!r}") from None
        return answers[0]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def answer(answers: dict[str, Callable[..., Any]]) -> None:
    """A process's part: answer questions until there are no more."""
    for line in sys.stdin:
        details = json.loads(line)
        print(REPLY + json.dumps(answers[details.pop("question")](**details)), flush=True)


def run_by_turns(sides: Sequence[Side], rounds: int, steps: int) -> dict[str, list[float]]:
    """Have every side run `steps` steps in every round, one side after the other.

    Returns:
        For each side, for each round, the mean seconds of a step.
    """
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            seconds[side.name].append(statistics.mean(side.ask("steps", count=steps)["seconds"]))
    return seconds


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
