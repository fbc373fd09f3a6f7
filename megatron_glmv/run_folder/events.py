"""What happened to a run, a line of JSON each, in RUN_FOLDER/events.jsonl: starts, stops, faults, and what was done about them.

metrics.jsonl is cut back when a run resumes, so that curves have each step once; this file never is.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

EVENTS_FILE = "events.jsonl"

Kind = Literal["start", "stop", "finish", "fault", "hang", "skip", "rollback", "damaged", "unsaved", "order"]
"""start: the ranks began or began again. stop, finish: they ended as asked, or after the last step. fault: how an earlier start
ended, told by the next one. hang: they stood still. skip: an update was refused. rollback: to a checkpoint, past some rows.
damaged: a checkpoint that cannot be trusted was set aside. unsaved: a checkpoint could not be written.
order: the data is drawn otherwise than before the start."""


def record_event(run_folder: Path, kind: Kind, step: int, text: str, **details: Any) -> None:
    """Add one line; a disk that refuses it does not end the run.

    Args:
        run_folder: of the run.
        kind: what happened.
        step: steps done.
        text: one line for people.
        details: what a program may want, as JSON.
    """
    line = json.dumps({"time": time.time(), "kind": kind, "step": step, "text": text, **details})
    try:
        with (run_folder / EVENTS_FILE).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError:
        return


def read_events(run_folder: Path, kinds: Iterable[Kind] = ()) -> list[dict[str, Any]]:
    """The events of a run, oldest first; of some kinds only, if named. Unfinished lines of killed ranks are passed over."""
    try:
        lines = (run_folder / EVENTS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    wanted, found = set(kinds), []
    for line in lines:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict) and (not wanted or event.get("kind") in wanted):
            found.append(event)
    return found


class EventLog:
    """Records what happens on the one rank that reports, and says it; the others keep silent.

    Args:
        run_folder: of the run.
        reports: whether this rank is the one.
        say: prints a line that stays; set when there is something that prints.
    """

    def __init__(self, run_folder: Path, *, reports: bool, say: Callable[[str], None] | None = None) -> None:
        self._run_folder, self._reports = run_folder, reports
        self.say = say

    def record(self, kind: Kind, step: int, text: str, details: Mapping[str, Any] | None = None) -> None:
        """Record and say one event; every rank may call it."""
        if not self._reports:
            return
        record_event(self._run_folder, kind, step, text, **(details or {}))
        if self.say is not None:
            self.say(text)
        else:
            print(text, file=sys.stderr, flush=True)
