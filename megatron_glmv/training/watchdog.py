"""Ends a run that hangs, and says who is behind.

Every rank keeps a small file in the run folder: step, phase, and when it was last heard of. Files outlive the ranks that die,
whatever carries the collectives, and can be read afterwards. A thread of each rank renews the file and, when the main thread
has not moved for too long, leaves the rank's stacks and last collectives; the first to notice joins those of all ranks in one
report that names the rank that is behind, and all end. If not even that thread can run, because native code holds the
interpreter, Python's faulthandler dumps the stacks and an alarm of the kernel ends the process; neither needs the interpreter.

Collectives must not give up first: start process groups with :func:`collective_timeout_s`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from megatron_glmv.run_folder.events import record_event
from megatron_glmv.run_folder.heartbeat import (
    FINISHED,
    FOLDER,
    LOST_CONTACT,
    Heartbeat,
    age,
    encode,
    heartbeat_path,
    is_gone,
    list_ranks,
    own_heartbeat,
    read_heartbeat,
)
from megatron_glmv.training.hang_report import compose_report, first_behind, save_report, stacks_path, words_path, write_words

EXIT_CODE = 70
"""Exit code of a rank that its watchdog has ended."""
_CLAIM, _DONE = "hang.txt", "hang.done"
"""Left by the rank that reports: when it begins, with one line, and when the report is there."""
_LOST_PEER = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "gloo", "nccl", "socket")


_started: Watchdog | None = None
"""This process's; its alarm is the process's, too."""


def still_moving() -> None:
    """Say that what the main thread waits for goes on. Where no watchdog has been started, nothing happens."""
    if _started is not None:
        _started.postpone()


def collective_timeout_s(timeout_s: float) -> float:
    """Timeout for process groups: later than the watchdog's, so that its message comes first."""
    return 1.5 * timeout_s + 30.0


class Watchdog:
    """Watches this rank's main thread.

    Args:
        run_folder: of the run, on a disk that all ranks share; files go to ranks/.
        rank: this rank.
        world_size: number of ranks.
        timeout_s: seconds without :meth:`beat` after which the process ends.
        stream: where the one line goes; None: stderr.
        coordinates: this rank's place in the layout, for reports.
    """

    def __init__(
        self,
        run_folder: Path,
        rank: int,
        world_size: int,
        timeout_s: float,
        stream: TextIO | None = None,
        coordinates: str = "",
    ) -> None:
        self._folder = run_folder / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._run_folder = run_folder
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._stream = stream if stream is not None else sys.stderr
        self._interval_s = min(5.0, timeout_s / 10)
        self._own = own_heartbeat(rank, world_size, coordinates)
        self.rows: Sequence[str] = ()
        """Ids of the rows of the step, for reports."""
        self._moved = time.monotonic()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        words_path(run_folder, rank).unlink(missing_ok=True)
        if rank == 0:
            for name in (_CLAIM, _DONE):
                (self._folder / name).unlink(missing_ok=True)
        heartbeat_path(run_folder, rank).unlink(missing_ok=True)
        self._file = os.open(heartbeat_path(run_folder, rank), os.O_RDWR | os.O_CREAT, 0o644)
        self._stacks = stacks_path(run_folder, rank).open("w", encoding="utf-8")
        self._publish()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        global _started  # noqa: PLW0603 - one a process
        _started = self
        self._moved = time.monotonic()
        self._arm()
        self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """Say that the main thread has come to a phase of a step; all ranks must make the same calls. Costs microseconds."""
        self._moved = time.monotonic()
        with self._lock:
            self._own = replace(self._own, step=step, phase=phase, beats=self._own.beats + 1, micro_batch=0, row="")
        self._publish()

    def postpone(self) -> None:
        """Say that the main thread is where it was, and waits for work that goes on."""
        self._moved = time.monotonic()

    def begin_row(self, number: int, total: int, key: str) -> None:
        """Say that a micro-batch begins; the watching thread writes it down. Costs a microsecond.

        Args:
            number: counted from 1, within the phase.
            total: micro-batches of the phase.
            key: the row's id.
        """
        self._moved = time.monotonic()
        with self._lock:
            row = f"micro-batch {number} of {total}, row {key[:100]}"
            self._own = replace(self._own, micro_batch=self._own.micro_batch + 1, row=row)

    def stop(self, end: str = FINISHED) -> None:
        """Stop watching, at the end of a run; `end` is the rank's last word."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._end(end)

    def describe_failure(self, error: BaseException) -> str:
        """One line for an exception that ends this rank; waits a moment to see whether a peer has died.

        Args:
            error: what the main thread caught.

        Returns:
            Who failed, at which step; for a lost peer the rank that was lost and where it was last heard of.
        """
        own, cause = self._own, " ".join(str(error).split())[:200] or type(error).__name__
        if not is_lost_peer(error):
            self._end(f"{type(error).__name__}: {cause}")
            return f"rank {own.rank} failed at {own.place}: {type(error).__name__}: {cause}"
        self._end(LOST_CONTACT)
        deadline = time.monotonic() + 3 * self._interval_s
        while True:
            beats = self.read()
            report = self._hang_report()
            if report:
                return f"rank {own.rank} ended at {own.place}: {report}"
            failed = [b for b in beats if b.has_failed]
            if failed:
                first = min(failed, key=lambda b: b.heard)
                where = f"rank {own.rank} ended at {own.place}"
                return f"{where} because rank {first.rank} failed at {first.place}: {first.failure}"
            lost = [b for b in beats if not b.failure and (is_gone(b) or self._is_silent(b))]
            if lost:
                names = "; ".join(f"rank {b.rank}: {b.place}, {age(b)} ago" for b in lost)
                return f"rank {own.rank} lost contact at {own.place}; last heard of {names}"
            if time.monotonic() > deadline:
                return f"rank {own.rank} lost contact at {own.place} ({cause}); {self._who_is_behind(beats)}"
            time.sleep(0.1)

    def read(self) -> list[Heartbeat]:
        """What every rank last said, in rank order; ranks that never started are missing."""
        return [
            beat
            for rank in range(self._world_size)
            if (beat := read_heartbeat(heartbeat_path(self._run_folder, rank))) is not None
        ]

    def _watch(self) -> None:
        while not self._stopped.wait(self._next_look_s()):
            self._arm()
            self._publish(durable=True)
            if time.monotonic() - self._moved > self._timeout_s:
                self._give_up()

    def _next_look_s(self) -> float:
        """Seconds to the next look: soon enough to notice a hang when its time is up."""
        left_s = self._timeout_s - (time.monotonic() - self._moved)
        return min(self._interval_s, max(left_s + 0.01, 0.05))

    def _arm(self) -> None:
        """Have the stacks dumped, and the process ended once the others have read them, unless this thread postpones both."""
        faulthandler.dump_traceback_later(self._timeout_s + 2 * self._interval_s, file=self._stacks)
        signal.setitimer(signal.ITIMER_REAL, self._timeout_s + 7 * self._interval_s)

    def _give_up(self) -> None:
        self._arm()  # for what is still to be done
        faulthandler.cancel_dump_traceback_later()
        report = f"no progress for {self._timeout_s:g} s: {self._who_is_behind(self.read())}"
        with contextlib.suppress(OSError):
            write_words(self._run_folder, self._rank, self.rows)
        # Last, for who joins the report takes the stacks as a sign that all is there.
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.flush()
        if self._claim_report(report):
            path = self._join_report(report)
            print(f"{report}; {path or 'no report could be written'}", file=self._stream, flush=True)
        else:
            self._wait_for((self._folder / _DONE).exists, 5)
        self._end(report)
        os._exit(EXIT_CODE)

    def _join_report(self, report: str) -> Path | None:
        """Wait until all ranks that can have left their last words, and make one file of them."""

        def all_have_spoken() -> bool:
            return all(
                beat.failure or is_gone(beat) or _has_text(stacks_path(self._run_folder, beat.rank)) for beat in self.read()
            )

        self._wait_for(all_have_spoken, 3.5)
        time.sleep(0.1)  # a dump goes to its file in pieces
        beats = self.read()
        try:
            text = compose_report(self._run_folder, report, beats, [beat.rank for beat in beats if self._is_silent(beat)])
            path = save_report(self._run_folder, text)
            (self._folder / _DONE).touch()
        except OSError:
            return None
        record_event(self._run_folder, "hang", self._own.step, f"{report}; {path}", report=str(path))
        return path

    def _wait_for(self, condition: Callable[[], bool], intervals: float) -> None:
        deadline = time.monotonic() + intervals * self._interval_s
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _who_is_behind(self, beats: list[Heartbeat]) -> str:
        """Name the ranks with the fewest beats, and those that are not heard of any more."""
        missing = sorted(set(range(self._world_size)) - {b.rank for b in beats})
        behind = first_behind(beats)
        others = [b for b in beats if b not in behind]
        verb = "is" if len(behind) == 1 else "are"
        if others:
            places = sorted({(b.step, b.place) for b in others})
            where = places[0][1] if len(places) == 1 else f"{places[0][1]} to {places[-1][1]}"
            text = f"{list_ranks(b.rank for b in behind)} {verb} at {behind[0].place} while the others are at {where}"
        else:
            text = f"{list_ranks(b.rank for b in behind)} {verb} at {behind[0].place}"
        silent = [b for b in beats if not b.failure and (is_gone(b) or self._is_silent(b))]
        if silent:
            text += "; " + ", ".join(f"rank {b.rank} was last heard of {age(b)} ago" for b in silent)
        if missing:
            text += f"; {list_ranks(missing)} never started"
        return text

    def _is_silent(self, beat: Heartbeat) -> bool:
        """Whether a rank's watchdog has stopped writing: the process is dead, frozen or cut off from the disk."""
        return beat.rank != self._rank and time.time() - beat.heard > 2.5 * self._interval_s

    def _end(self, failure: str) -> None:
        """Say why this rank ends; only the first reason stays."""
        with self._lock:
            self._own = replace(self._own, failure=self._own.failure or failure[:400])
        self._publish(durable=True)

    def _publish(self, durable: bool = False) -> None:
        """Write this rank's file; `durable` waits for the disk, so that other machines see it."""
        try:
            with self._lock:
                os.pwrite(self._file, encode(self._own), 0)
            if durable:
                os.fsync(self._file)
        except OSError:
            return  # a disk that refuses must not end a run that goes well

    def _claim_report(self, report: str) -> bool:
        """Whether this rank is the first to report; the others stay silent."""
        try:
            with (self._folder / _CLAIM).open("x", encoding="utf-8") as file:
                file.write(report + "\n")
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def _hang_report(self) -> str:
        try:
            return (self._folder / _CLAIM).read_text(encoding="utf-8").strip()
        except OSError:
            return ""


def _has_text(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exception of a collective means that a peer has gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(word in text for word in _LOST_PEER)
