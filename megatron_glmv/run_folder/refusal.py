"""A fault that no restart repairs (configuration, data, checkpoint, an occupied folder), noted so that nothing retries it.

torchrun starts a failed group again whatever the reason. The rank that meets such a fault leaves a note for its launch; a
restarted rank that finds it ends at once with the same line. An outage (a server that is down) is no such fault: a later start
may find it over.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from megatron_glmv.config.base import InputError
from megatron_glmv.run_folder.heartbeat import FOLDER, Heartbeat, is_gone, read_heartbeats
from megatron_glmv.run_folder.launch import is_first_rank, launch_id, num_restarts

_NOTE = "refused.json"
QUIET_S = 30.0
"""Ranks renew their files every 5 s at most; what has not been renewed for so long is dead, on whatever host."""
_LOOK_EVERY_S = 1.0


class OccupiedError(InputError):
    """Another launch runs in the folder; this says nothing of the run itself."""


class Outage(InputError):
    """What the run needs beside itself is down; the same start may succeed later, so that it is not noted."""


def note_refusal(run_folder: Path, error: InputError) -> None:
    """Leave the reason for the restarts of this launch, and for ``glmv status --exit-code``."""
    note = {"launch": launch_id(), "time": time.time(), "text": " ".join(str(error).split())}
    note["occupied"] = isinstance(error, OccupiedError)
    path = run_folder / FOLDER / _NOTE
    temporary = path.with_name(f"{_NOTE}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(note), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return


def read_refusal(run_folder: Path, launch: str = "") -> str:
    """Why the newest start, or one launch, cannot go on; empty when nothing says so.

    A launch that found another in the folder is refused itself, but not the run: that goes on.
    """
    note = _read(run_folder)
    counts = launch == note.get("launch") if launch else not note.get("occupied")
    return str(note.get("text", "")) if counts else ""


def repeat_refusal(run_folder: Path) -> None:
    """End a restart of a launch that has met such a fault; at a new launch, forget the earlier one's.

    Raises:
        InputError: the earlier one's line.
    """
    if num_restarts():
        note = _read(run_folder)
        if note.get("launch") == launch_id():
            raise InputError(str(note["text"]))
    elif is_first_rank():
        (run_folder / FOLDER / _NOTE).unlink(missing_ok=True)


def refuse_second_launch(run_folder: Path) -> None:
    """Make sure that no rank of another launch lives in the folder: two would write the same checkpoints and metrics.

    Ranks of this host are known to be dead, and not waited for. Those of other hosts, such as a killed launch's that was given
    back to the queue, are waited for until their files are old or renewed.

    Raises:
        OccupiedError: a file was renewed; who runs there, since when, and what to do.
    """
    began = time.monotonic()
    first: dict[int, float] = {}
    while others := [beat for beat in read_heartbeats(run_folder) if _may_live(beat)]:
        for beat in others:
            if beat.heard != first.setdefault(beat.rank, beat.heard):
                since = f" since {time.strftime('%F %T', time.localtime(beat.began))}" if beat.began else ""
                where = f"rank {beat.rank} on {beat.host}, process {beat.process}, is at {beat.place}"
                advice = "end it with glmv stop, or name another run_folder"
                raise OccupiedError(f"{run_folder}: another launch runs there{since}: {where}; {advice}")
        if time.monotonic() - began > QUIET_S:
            return
        time.sleep(_LOOK_EVERY_S)


def _may_live(beat: Heartbeat) -> bool:
    """Whether a rank of another launch has not ended, as far as this host knows."""
    if launch_id():
        ours = beat.launch == launch_id()
    else:
        ours = num_restarts() > 0 or (beat.host, beat.process) == (socket.gethostname(), os.getpid())
    return not (ours or beat.failure or is_gone(beat)) and time.time() - beat.heard < QUIET_S


def _read(run_folder: Path) -> dict[str, object]:
    try:
        note = json.loads((run_folder / FOLDER / _NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}
