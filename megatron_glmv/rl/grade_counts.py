"""Counts of right answers on disk, so that grading continues where it stopped and many machines share one job.

Each part appends to a file of its own in one folder, a line for each model and prompt. A prompt is done when any file has a
line for it, so the number of parts may change between runs.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_glmv.config.base import InputError

SETTINGS = "settings.json"


class GradeError(InputError):
    """Grading that cannot start or go on; one line that says what to do."""


@dataclass(frozen=True)
class Count:
    """What one model made of one prompt.

    Attributes:
        answers: judged ones.
        right: of these.
        masked: answers that could not be judged.
        fault: why the prompt could not be read, or "".
    """

    answers: int = 0
    right: int = 0
    masked: int = 0
    fault: str = ""


Counts = dict[tuple[int, str], Count]
"""(number of the model, key of the prompt) -> count."""


class CountFolder:
    """The folder of a job that is not complete.

    Args:
        path: of the folder.
        settings: everything that counts depend on, as JSON; runs with other settings are refused.

    Raises:
        GradeError: the folder belongs to another job.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        wanted: dict[str, Any] = json.loads(json.dumps(settings))
        file = path / SETTINGS
        path.mkdir(parents=True, exist_ok=True)
        with self.alone():
            if not file.exists():
                if any(other.name != "lock" for other in path.iterdir()):
                    raise GradeError(f"{path}: exists and is no folder of this tool; remove it or choose another --out")
                write_json(file, wanted)
            found = read_json(file)
        if found is None or (keys := different(found, wanted)):
            named = "" if found is None else f" ({', '.join(keys)})"
            raise GradeError(f"{path}: was begun with other settings{named}; repeat them, remove it or choose another --out")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Only one process of all parts at a time; a killed one lets go."""
        with (self.path / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def read(self) -> Counts:
        """The counts of all parts; of two for the same prompt, the one with more judged answers."""
        counts: Counts = {}
        for file in sorted(self.path.glob("counts-*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                try:
                    tree = json.loads(line)
                    key, count = (int(tree.pop("model")), str(tree.pop("key"))), Count(**tree)
                except (ValueError, TypeError, KeyError, AttributeError):
                    continue  # empty, or the line that was being written when a run was killed
                if key not in counts or count.answers > counts[key].answers:
                    counts[key] = count
        return counts

    def open_part(self, number: int, total: int) -> CountFile:
        """The file of one part, for appending.

        Raises:
            GradeError: another process has it.
        """
        return CountFile(self.path / f"counts-{number}-of-{total}.jsonl")


class CountFile:
    """Appends counts, each on disk at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise GradeError(f"{path}: another run is working on this part; choose another --part, or wait for it") from None
        if self._file.tell():
            self._file.write(b"\n")  # ends the line that was being written when a run was killed

    def add(self, model: int, key: str, count: Count) -> None:
        """Keep one count."""
        self._file.write(json.dumps({"model": model, "key": key, **asdict(count)}).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def different(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of settings that differ."""
    return sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all."""
    partial = path.with_name(f"{path.name}.tmp{os.getpid()}")
    partial.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
