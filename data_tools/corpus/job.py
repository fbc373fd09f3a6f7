"""The frame that tools over a corpus run in: chunks of work, done by many processes and machines, each exactly once.

A chunk's result is complete when its marker is there, and the marker is written last; so a killed run continues behind the
complete chunks, and parts of a job (`--part i/n`) share one folder without talking to each other. A part is done by one process
at a time. Whoever finds every marker finishes the job. OUT appears in one rename.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from data_tools.corpus.locks import claim, wait_turn
from data_tools.corpus.reader import LISTS, CorpusError

REPORT = "report.json"
SETTINGS = "settings.json"
LOCK = "lock"
PART_LOCKS = "part-*-of-*.lock"
DROPPED, REPAIRED = LISTS
FEWEST_JUDGED = 1000
"""Samples before the share of faults is judged, and at the end."""
POLL_S = 1.0


class JobStopped(CorpusError):
    """A job that cannot go on: too many faults, or a worker that died. What is done stays done."""


@dataclass(frozen=True)
class Part:
    """Which share of the chunks a run does: chunk numbers that are `number` modulo `count`."""

    number: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read `i/n`.

        Raises:
            ArgumentTypeError: not two integers with 0 <= i < n.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not found or int(found[1]) >= int(found[2]):
            raise argparse.ArgumentTypeError(f"{text!r} is not i/n with 0 <= i < n")
        return cls(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Tally:
    """What became of the samples of a chunk, or of many.

    Attributes:
        samples: read, faults included.
        kept: written.
        dropped: by reason, faults and rejections.
        faults: dropped because the input is bad.
        counts: what else a tool counts.
        seconds: of work.
    """

    samples: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    faults: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.samples + other.samples, self.kept + other.kept, _add(self.dropped, other.dropped), self.faults + other.faults,
            _add(self.counts, other.counts), self.seconds + other.seconds,
        )  # fmt: skip


class Numbered(Protocol):
    """A chunk of work."""

    @property
    def number(self) -> int:
        """Counts from 0 over all parts."""


C = TypeVar("C", bound=Numbered)
Work = Callable[[C, Path], Tally]
"""Does one chunk and may leave files under its number in the folder of the pass; picklable. It overwrites what it left."""


class Job:
    """One tool's run into one folder."""

    def __init__(
        self,
        tool: str,
        out: Path,
        settings: dict[str, Any],
        *,
        part: Part | None = None,
        num_workers: int = 0,
        max_bad_share: float = 0.05,
        wait_s: float = 0.0,
    ) -> None:
        """Describe a job; `start` touches the disk.

        Args:
            tool: its name.
            out: folder that appears when the job is complete; until then it is OUT.partial.
            settings: everything that the output depends on, as JSON.
            part: share of this run.
            num_workers: processes; 0 for as many as there are cores.
            max_bad_share: share of samples with faults above which the job stops.
            wait_s: how long to wait for the other parts before a step that needs all of them.
        """
        self.tool, self.out = tool, out
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.part = part or Part()
        self.partial = out.with_name(out.name + ".partial")
        self._num_workers, self._max_bad_share, self._wait_s = num_workers, max_bad_share, wait_s

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """The whole of this part's work, from before `start`: no other process does it meanwhile. A killed one lets go.

        Raises:
            CorpusError: another process works on this part or on one of another division, or OUT.partial holds something else.
        """
        if self.out.exists():  # nothing is left to do, as `start` finds
            yield
            return
        own = f"part-{self.part.number}-of-{self.part.count}.lock"
        if self.partial.exists() and not (self.partial / SETTINGS).exists():
            locks = {path.name for path in self.partial.glob(PART_LOCKS)} | {LOCK}
            if any(path.name not in locks for path in self.partial.iterdir()):
                raise CorpusError(f"{self.partial}: exists and is no folder of this tool; remove it or choose another OUT")
        self.partial.mkdir(parents=True, exist_ok=True)
        with claim(self.partial / own, _describe_part(own)):
            with self.alone():
                # Parts of 2 and of 3 have chunks in common.
                for path in self.partial.glob(PART_LOCKS):
                    if not path.name.endswith(f"-of-{self.part.count}.lock"):
                        with claim(path, _describe_part(path.name)):
                            pass
            yield

    def start(self) -> dict[str, Any] | None:
        """Open OUT.partial, or find that the job is complete; within `claimed`.

        Returns:
            The report of a complete job, else None.

        Raises:
            CorpusError: OUT holds something else, or one of them was made with other settings.
        """
        finished = self.finished()
        if finished is not None:
            return finished
        path = self.partial / SETTINGS
        with self.alone():
            # The part that finishes holds the lock while it writes chunks again and until OUT has its name.
            finished = self.finished()
            if finished is not None:
                return finished
            if not path.exists():
                write_json(path, {"tool": self.tool, "settings": self.settings})
            self._check(path, json.loads(path.read_text(encoding="utf-8")))
            if (self.partial / REPORT).exists():
                return self._publish()
        return None

    def finished(self) -> dict[str, Any] | None:
        """The report of a complete job; None as long as it is not.

        Raises:
            CorpusError: OUT holds something else, or was made with other settings.
        """
        if not self.out.exists():
            return None
        try:
            report = json.loads((self.out / REPORT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise CorpusError(f"{self.out}: exists and is no output of this tool; remove it or choose another OUT") from None
        self._check(self.out, report)
        self._tidy()
        return report | {"reused": True}

    def run_pass(self, name: str, chunks: Sequence[C], work: Work[C]) -> bool:
        """Do the chunks of this part that are not done.

        Args:
            name: of the pass; its folder.
            chunks: all of the job.
            work: does one chunk.

        Returns:
            Whether the chunks of every part are done.

        Raises:
            JobStopped: too many faults, or a worker that died.
        """
        folder = self.partial / name
        folder.mkdir(exist_ok=True)
        own = [chunk for chunk in chunks if chunk.number % self.part.count == self.part.number]
        done = self._done(name)
        total = sum((self._load(name, chunk.number) for chunk in own if chunk.number in done), Tally())
        self._judge(total)
        todo = [chunk for chunk in own if chunk.number not in done]
        with tqdm(total=len(own), initial=len(own) - len(todo), desc=f"{self.tool} {name}", unit=" chunks") as bar:
            for tally in self._run(work, todo, folder):
                total += tally
                bar.update()
                bar.set_postfix(samples=total.samples, kept=total.kept, faults=total.faults, refresh=False)
                self._judge(total)
        self._judge(total, at_end=True)
        # Behind this mark the part writes nothing more, so that another may finish.
        write_json(self.partial / self._part_mark(name, self.part.number), asdict(total))
        return self._wait_for_parts(name, {chunk.number for chunk in chunks})

    def redo(self, name: str, chunks: Sequence[C], work: Work[C]) -> None:
        """Do chunks again, complete or not; for steps after a pass, alone."""
        folder = self.partial / name
        for chunk in chunks:
            _marker(folder, chunk.number).unlink(missing_ok=True)
        for _ in self._run(work, chunks, folder):
            pass

    def total(self, name: str, chunks: Sequence[C]) -> Tally:
        """What became of all samples in a complete pass."""
        return sum((self._load(name, chunk.number) for chunk in chunks), Tally())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Only one process of all parts at a time; a killed one lets go. Others may finish the job before its turn."""
        folder = self.partial if self.partial.exists() else self.out
        with wait_turn(folder / LOCK):
            yield

    def waiting_report(self, name: str) -> dict[str, Any]:
        """What this part prints when others are not done."""
        part = f"{self.part.number}/{self.part.count}"
        hint = f"part {part} of pass {name!r} is complete; run every part again when all have come this far"
        return {"tool": self.tool, "complete": False, "part": part, "pass": name, "next": hint}

    def finish(self, passes: Sequence[str], chunks: Sequence[C], extra: dict[str, Any]) -> dict[str, Any]:
        """Merge what the chunks of the last pass dropped, write the report, and give the folder its name.

        Args:
            passes: of the job; the last one's tallies count.
            chunks: of the last pass.
            extra: further entries of the report.
        """
        total = self.total(passes[-1], chunks)
        for file in LISTS:
            merge_lines([self.partial / passes[-1] / f"{chunk.number:06d}.{file}" for chunk in chunks], self.partial / file)
        report = {
            "tool": self.tool, "complete": True, "samples": total.samples, "kept": total.kept, "faults": total.faults,
            "dropped": dict(sorted(total.dropped.items())), **dict(sorted(total.counts.items())), **extra,
            "seconds": round(total.seconds, 1), "settings": self.settings,
        }  # fmt: skip
        write_json(self.partial / REPORT, report | {"passes": list(passes)})
        return self._publish()

    def _publish(self) -> dict[str, Any]:
        """Remove what only the job needs and rename; may be repeated after a kill at any point."""
        report = json.loads((self.partial / REPORT).read_text(encoding="utf-8"))
        for name in (*report.pop("passes", ()), "plan", "scratch"):
            shutil.rmtree(self.partial / name, ignore_errors=True)
        for path in (*self.partial.glob("part-*-of-*.json"), *self.partial.glob("*.tmp*")):
            path.unlink(missing_ok=True)
        write_json(self.partial / REPORT, report)
        # Behind the rename: a folder without settings would be taken for one of another tool after a kill.
        self.partial.rename(self.out)
        self._tidy()
        return report

    def _tidy(self) -> None:
        for path in (self.out / SETTINGS, self.out / LOCK, *self.out.glob(PART_LOCKS)):
            path.unlink(missing_ok=True)

    def _check(self, path: Path, found: dict[str, Any]) -> None:
        if found.get("tool") != self.tool:
            raise CorpusError(f"{path}: made by {found.get('tool')!r}; remove it or choose another OUT")
        other = found.get("settings", {})
        keys = sorted(key for key in {*self.settings, *other} if other.get(key) != self.settings.get(key))
        if keys:
            raise CorpusError(f"{path}: made with other {', '.join(keys)}; remove it or choose another OUT")

    def _judge(self, total: Tally, at_end: bool = False) -> None:
        if total.samples >= (1 if at_end else FEWEST_JUDGED) and total.faults > self._max_bad_share * total.samples:
            reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(total.dropped).most_common())
            raise JobStopped(
                f"{total.faults} of {total.samples} samples have faults, more than --max-bad-share {self._max_bad_share:g}"
                f" ({reasons}); they are named in {self.partial}/*/*.{DROPPED}; a larger share continues from here"
            )

    def _done(self, name: str) -> set[int]:
        return {int(path.name.partition(".")[0]) for path in (self.partial / name).glob("*.done.json")}

    def _load(self, name: str, number: int) -> Tally:
        return Tally(**json.loads(_marker(self.partial / name, number).read_text(encoding="utf-8")))

    def _wait_for_parts(self, name: str, numbers: set[int]) -> bool:
        deadline = time.monotonic() + self._wait_s
        while not self._is_complete(name, numbers):
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)
        return True

    def _is_complete(self, name: str, numbers: set[int]) -> bool:
        marks = (self.partial / self._part_mark(name, number) for number in range(self.part.count))
        return self.out.exists() or (all(mark.exists() for mark in marks) and numbers <= self._done(name))

    def _part_mark(self, name: str, number: int) -> str:
        return f"part-{number}-of-{self.part.count}.{name}.json"

    def _run(self, work: Work[C], chunks: Sequence[C], folder: Path) -> Iterator[Tally]:
        cores = len(os.sched_getaffinity(0))
        workers = min(self._num_workers or cores, len(chunks))
        if workers <= 1:
            for chunk in chunks:
                yield _do_chunk(work, chunk, folder)
            return
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _die_with_parent, (os.getpid(),))
        waiting: set[Future[Tally]] = set()
        try:
            for chunk in chunks:
                waiting.add(pool.submit(_do_chunk, work, chunk, folder))
                if len(waiting) >= 2 * workers:
                    finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        except BrokenProcessPool:
            raise JobStopped(f"{folder}: a worker process died (out of memory?); use fewer --workers and run again") from None
        finally:
            pool.shutdown(cancel_futures=True)


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all."""
    partial = path.with_name(f"{path.name}.tmp{os.getpid()}")
    partial.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def merge_lines(paths: Sequence[Path], target: Path) -> None:
    """Concatenate the files that are there; no file when nothing is in them."""
    partial = target.with_name(f"{target.name}.tmp{os.getpid()}")
    with partial.open("wb") as merged:
        for path in paths:
            if path.exists():
                with path.open("rb") as file:
                    shutil.copyfileobj(file, merged)
    if partial.stat().st_size:
        partial.replace(target)
    else:
        partial.unlink()


def chunk_path(folder: Path, number: int, suffix: str) -> Path:
    """A file of a chunk in the folder of a pass."""
    return folder / f"{number:06d}.{suffix}"


def _describe_part(lock: str) -> str:
    _, number, _, count = lock.removesuffix(".lock").split("-")
    return f"part {number}/{count}" if count != "1" else "this job"


def _marker(folder: Path, number: int) -> Path:
    return chunk_path(folder, number, "done.json")


def _do_chunk(work: Work[C], chunk: C, folder: Path) -> Tally:
    started = time.monotonic()
    tally = work(chunk, folder)
    tally += Tally(seconds=time.monotonic() - started)
    write_json(_marker(folder, chunk.number), asdict(tally))
    return tally


def _die_with_parent(parent: int) -> None:
    """A worker ends when the command is killed: an orphan would go on writing into a folder that the next run is using."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _add(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in {**a, **b}}
