"""What each rank last said of itself, in a small file of its own in the run folder.

Files outlive the ranks that die, whatever carries the collectives, and anyone who sees the disk can read them. Nothing here
needs a process group.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_glmv.run_folder.launch import launch_id, launch_start

FOLDER = "ranks"
FINISHED, STOPPED, LOST_CONTACT = "finished", "stopped", "lost contact"
"""Ends that are no fault of the rank that met them."""
_RECORD_BYTES = 1024
_PADDING = b"\0 \n"


@dataclass(frozen=True)
class Heartbeat:
    """What one rank last said of itself."""

    rank: int
    step: int
    phase: str
    beats: int
    """Calls of :meth:`Watchdog.beat`; all ranks make the same ones, so the smallest is behind."""
    heard: float
    """Seconds since the epoch when the file was written."""
    host: str
    process: int
    failure: str = ""
    """Why this rank ended, once it does."""
    ranks: int = 0
    """Ranks of the run; 0: not known."""
    coordinates: str = ""
    """Place in the layout: tensor, pipeline, context and data rank."""
    micro_batch: int = 0
    """Micro-batches of the phase that it has begun."""
    row: str = ""
    """The newest of them, and the row's id."""
    launch: str = ""
    """Of the rank: :func:`launch_id`."""
    began: float = 0.0
    """Seconds since the epoch when that launch began; 0: not known."""

    @property
    def place(self) -> str:
        """Where the rank is, for messages."""
        return f"step {self.step} ({self.phase})"

    @property
    def stage(self) -> str:
        """The part of the coordinates that names the pipeline stage."""
        return next((part for part in self.coordinates.split(", ") if part.startswith("pipeline")), "")

    @property
    def has_failed(self) -> bool:
        """Whether the rank ended by a fault of its own."""
        return self.failure not in ("", FINISHED, STOPPED, LOST_CONTACT)


def heartbeat_path(run_folder: Path, rank: int) -> Path:
    """The file of one rank."""
    return run_folder / FOLDER / f"rank_{rank:04d}.json"


def forget_ranks(run_folder: Path, ranks: int) -> None:
    """Remove the files of ranks that an earlier, larger start had."""
    for path in (run_folder / FOLDER).glob("rank_*"):
        number = path.name[len("rank_") :].partition(".")[0]
        if number.isdigit() and int(number) >= ranks:
            path.unlink(missing_ok=True)


def read_heartbeat(path: Path) -> Heartbeat | None:
    """One rank's file; None where there is none, or not a whole one."""
    try:
        return Heartbeat(**json.loads(path.read_bytes().rstrip(_PADDING)))
    except (OSError, ValueError, TypeError):
        return None


def read_heartbeats(run_folder: Path, launch: str = "") -> list[Heartbeat]:
    """What every rank of a run last said, in rank order, whatever their number; of one launch only, if named."""
    found = map(read_heartbeat, sorted((run_folder / FOLDER).glob("rank_*.json")))
    return [beat for beat in found if beat is not None and launch in ("", beat.launch)]


def encode(beat: Heartbeat) -> bytes:
    """A heartbeat, said now, as the bytes of its file: always as many, so that a shorter one leaves no rest of a longer."""
    return json.dumps(asdict(replace(beat, heard=time.time()))).encode().ljust(_RECORD_BYTES)


def is_gone(beat: Heartbeat) -> bool:
    """Whether a process of this machine has ended; others cannot be asked."""
    if beat.host != socket.gethostname():
        return False
    state = process_state(beat)
    return state in ("Z", "X") if state else Path("/proc/self").exists()


def process_state(beat: Heartbeat) -> str:
    """The kernel's letter for a process of this machine (R runs, S waits, T stopped, D waits for a disk); empty: not known."""
    if beat.host != socket.gethostname():
        return ""
    try:
        return Path(f"/proc/{beat.process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return ""


def describe_end(beats: Sequence[Heartbeat]) -> tuple[int, str] | None:
    """How the ranks of an earlier start ended, when that was not as planned.

    Args:
        beats: what every rank last said.

    Returns:
        The step they had come to, and one line; None when they finished, stopped on request, or never started.
    """
    if not beats or all(beat.failure in (FINISHED, STOPPED) for beat in beats):
        return None
    step = max(beat.step for beat in beats)
    if failed := [beat for beat in beats if beat.has_failed]:
        first = min(failed, key=lambda beat: beat.heard)
        return step, f"rank {first.rank} on {first.host} at {first.place}: {first.failure}"
    silent = [beat for beat in beats if not beat.failure]
    first = min(silent or beats, key=lambda beat: beat.heard)
    more = f" ({len(silent)} of {len(beats)} ranks ended without a word)" if len(silent) > 1 else ""
    word = "lost contact" if first.failure else "was killed"
    return step, f"rank {first.rank} on {first.host} {word} at {first.place}{more}"


def list_ranks(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 1, 2, 5`` or ``ranks 0, 1, 2, 3 and 60 more``."""
    listed = list(ranks)
    if len(listed) == 1:
        return f"rank {listed[0]}"
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return "ranks " + ", ".join(str(rank) for rank in listed[:8]) + more


def age(beat: Heartbeat) -> str:
    """How long ago a rank was heard of."""
    return f"{max(time.time() - beat.heard, 0):.1f} s"


def own_heartbeat(rank: int, ranks: int, coordinates: str) -> Heartbeat:
    """The first heartbeat of this process."""
    first = Heartbeat(rank, 0, "start", 0, time.time(), socket.gethostname(), os.getpid())
    return replace(first, ranks=ranks, coordinates=coordinates, launch=launch_id(), began=launch_start())
