"""One file about a hang: who is behind and where, what every rank did last, and the Python stacks of all.

Each rank leaves its last words beside its heartbeat: the rows of its step, its newest collectives as torch's flight recorder
has them (it records on NCCL and on gloo without being asked), and its stacks. The rank that reports waits for them and joins
them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch._C import _distributed_c10d

from megatron_glmv.run_folder.heartbeat import FOLDER, Heartbeat, age, list_ranks, process_state

REPORTS = "hangs"
"""Folder of the run that keeps the reports."""
_KEPT = 20
_SHOWN_COLLECTIVES = 6
_RECORDERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
"""Gloo's recorder and NCCL's: a build for CUDA has both, each with collectives of its own; others have the first alone."""
_STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waits for a disk or a driver", "Z": "dead"}


def words_path(run_folder: Path, rank: int) -> Path:
    """Where a rank leaves what the heartbeat has no room for."""
    return run_folder / FOLDER / f"rank_{rank:04d}.words.json"


def stacks_path(run_folder: Path, rank: int) -> Path:
    """Where a rank, or faulthandler for it, leaves its stacks."""
    return run_folder / FOLDER / f"rank_{rank:04d}.stacks.txt"


def write_words(run_folder: Path, rank: int, rows: Sequence[str]) -> None:
    """Leave this rank's last words; appears whole or not at all."""
    path = words_path(run_folder, rank)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"rows": list(rows), "collectives": recent_collectives()}), encoding="utf-8")
    temporary.replace(path)


def recent_collectives() -> list[dict[str, Any]]:
    """This rank's newest collectives, oldest first, from torch's flight recorders; none where they are switched off."""
    entries: list[dict[str, Any]] = []
    for recorder in _RECORDERS:
        entries += [entry for entry in _newest_entries(recorder) if entry not in entries]
    return [
        {
            "group": " ".join(entry["process_group"]),
            "number": entry["p2p_seq_id"] if entry.get("is_p2p") else entry["collective_seq_id"],
            "name": entry["profiling_name"],
            "sizes": entry["input_sizes"],
            "done": bool(entry["retired"]),
        }
        for entry in sorted(entries, key=lambda entry: int(entry.get("time_created_ns", 0)))
    ]


def _newest_entries(recorder: str) -> list[dict[str, Any]]:
    """The newest 50 entries of one recorder; none where torch lacks it or it cannot be read."""
    try:
        return list(json.loads(getattr(_distributed_c10d, recorder)(True, False)).get("entries", []))[-50:]
    except (AttributeError, RuntimeError, ValueError, TypeError):
        return []


def compose_report(run_folder: Path, headline: str, beats: Sequence[Heartbeat], silent: Sequence[int]) -> str:
    """The text of the report.

    Args:
        run_folder: where ranks have left their words.
        headline: who is behind.
        beats: what every rank last said.
        silent: ranks whose watchdogs have fallen silent.
    """
    words = {beat.rank: _read_words(run_folder, beat.rank) for beat in beats}
    parts = [headline, "", *_behind(beats, silent), *_collectives_behind(words)]
    parts += ["", "# Where the ranks are, the furthest behind first", ""]
    first = first_behind(beats, silent)
    ordered = sorted(beats, key=lambda beat: (beat not in first, beat.beats, beat.rank))
    parts += [_line(beat, beat.rank in silent) for beat in ordered]
    for beat in ordered:
        parts += ["", f"# rank {beat.rank}: {beat.coordinates}", "", *_own_part(run_folder, beat, words[beat.rank])]
    return "\n".join(parts) + "\n"


def save_report(run_folder: Path, text: str) -> Path:
    """Keep a report under the next number; the oldest beyond the newest 20 are removed."""
    folder = run_folder / REPORTS
    folder.mkdir(parents=True, exist_ok=True)
    found = {int(match[1]): path for path in folder.iterdir() if (match := re.fullmatch(r"hang_(\d+)\.txt", path.name))}
    path = folder / f"hang_{max(found, default=0) + 1:04d}.txt"
    path.write_text(text, encoding="utf-8")
    for number in sorted(found)[: -(_KEPT - 1)]:
        found[number].unlink(missing_ok=True)
    return path


def first_behind(beats: Sequence[Heartbeat], silent: Collection[int] = ()) -> list[Heartbeat]:
    """The ranks that have come least far: by calls of beat; among equals those that are silent, then by micro-batch.

    Stages of a pipeline are at different micro-batches when all is well, so only ranks of one stage are compared by them.
    """
    least = min(beat.beats for beat in beats)
    behind = [beat for beat in beats if beat.beats == least]
    if len(behind) < len(beats):
        return behind
    if quiet := [beat for beat in beats if beat.rank in silent]:
        return quiet
    furthest: dict[str, int] = {}
    for beat in beats:
        furthest[beat.stage] = max(furthest.get(beat.stage, 0), beat.micro_batch)
    return [beat for beat in beats if beat.micro_batch < furthest[beat.stage]] or behind


def _behind(beats: Sequence[Heartbeat], silent: Collection[int]) -> list[str]:
    behind = first_behind(beats, silent)
    if len(behind) == len(beats):
        return ["All ranks have come equally far by their own account."]
    first = behind[0]
    row = f", in {first.row}" if first.row else ""
    where = f"rank {first.rank} ({first.coordinates}) on {first.host}, process {first.process}"
    return [f"First behind: {where}: {first.place}{row}"]


def _collectives_behind(words: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Groups in which some ranks have entered a later collective than others."""
    # NCCL and gloo count by themselves, also in a group that has both.
    reached: dict[tuple[str, str], dict[int, tuple[int, str]]] = {}
    for rank, said in words.items():
        for entry in said.get("collectives", []):
            kind = "send or receive" if ":send" in entry["name"] or ":recv" in entry["name"] else "collective"
            key = f"{entry['group']}, {kind}", entry["name"].partition(":")[0]
            number = int(entry["number"])
            if number >= reached.setdefault(key, {}).get(rank, (0, ""))[0]:
                reached[key][rank] = number, entry["name"]
    lines = []
    for (group, _), ranks in reached.items():
        furthest = max(number for number, _ in ranks.values())
        late = {rank: number for rank, (number, _) in ranks.items() if number < furthest}
        if late:
            name = next(name for number, name in ranks.values() if number == furthest)
            places = ", ".join(f"rank {rank} at {number}" for rank, number in sorted(late.items())[:8])
            lines.append(f"Group {group} {furthest} ({name}) was entered by {list_ranks(set(ranks) - set(late))}; {places}")
    return lines


def _line(beat: Heartbeat, silent: bool) -> str:
    state = _STATES.get(process_state(beat), "")
    said = f"; silent for {age(beat)}" if silent else ""
    row = f", {beat.row}" if beat.row else ""
    return f"rank {beat.rank:4d}  {beat.place}{row}  on {beat.host}{said}{f' ({state})' if state else ''}"


def _own_part(run_folder: Path, beat: Heartbeat, words: Mapping[str, Any]) -> list[str]:
    """Rows, collectives and stacks of one rank."""
    lines = []
    if words.get("rows"):
        lines.append(f"rows of the step: {', '.join(words['rows'])}")
    for entry in words.get("collectives", [])[-_SHOWN_COLLECTIVES:]:
        done = "done" if entry["done"] else "not done"
        lines.append(f"{entry['name']} no. {entry['number']} in {entry['group']}, sizes {entry['sizes']}: {done}")
    try:
        stacks = stacks_path(run_folder, beat.rank).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        stacks = ""
    return [*lines, stacks or f"no stacks: process {beat.process} on {beat.host} did not answer; try py-spy dump there"]


def _read_words(run_folder: Path, rank: int) -> dict[str, Any]:
    try:
        return json.loads(words_path(run_folder, rank).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
