"""A fault that no restart repairs (configuration, data, checkpoint), noted so that no launcher and no batch script retries it.

torchrun starts a failed group again whatever the reason. The rank that meets such a fault leaves a note for its launch; a
restarted rank that finds it ends at once with the same line. An outage (a server that is down) is no such fault: a later start
may find it over.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from megatron_glmv.config.base import InputError
from megatron_glmv.run_folder.heartbeat import FOLDER
from megatron_glmv.run_folder.launch import is_first_rank, launch_id, num_restarts

_NOTE = "refused.json"


class Outage(InputError):
    """What the run needs beside itself is down; the same start may succeed later, so that it is not noted."""


def note_refusal(run_folder: Path, error: InputError) -> None:
    """Leave the reason for the restarts of this launch, and for ``glmv status --exit-code``."""
    note = {"launch": launch_id(), "time": time.time(), "text": " ".join(str(error).split())}
    path = run_folder / FOLDER / _NOTE
    temporary = path.with_name(f"{_NOTE}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(note), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return


def read_refusal(run_folder: Path, launch: str = "") -> str:
    """Why the newest start, or one launch, cannot go on; empty when nothing says so."""
    note = _read(run_folder)
    return str(note.get("text", "")) if launch in ("", note.get("launch")) else ""


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


def _read(run_folder: Path) -> dict[str, object]:
    try:
        note = json.loads((run_folder / FOLDER / _NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}
