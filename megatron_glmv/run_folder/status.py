"""``glmv status``: the state of a run from the files in its folder alone, on any machine that sees them.

No process of the run is asked, so it answers for a run that is over, was killed, or is on another machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_glmv.config.base import InputError, read_yaml
from megatron_glmv.run_folder.checkpoint_folder import complete_folders, read_manifest
from megatron_glmv.run_folder.events import read_events
from megatron_glmv.run_folder.figures import format_count, format_duration
from megatron_glmv.run_folder.heartbeat import (
    FINISHED,
    FOLDER,
    LOST_CONTACT,
    STOPPED,
    Heartbeat,
    describe_end,
    is_gone,
    read_heartbeats,
)
from megatron_glmv.run_folder.metrics_file import METRICS_FILE, read_metrics
from megatron_glmv.run_folder.refusal import read_refusal

SILENT_S = 60.0
"""A rank renews its file every few seconds; one that has not for so long has ended or lost its disk."""


FINISHED_CODE, REFUSED_CODE, GOES_ON_CODE = 0, 1, 3
"""Exit codes for a script that decides whether to start a run again: it is done, it would fail the same way, it can go on."""
_SAME_FAULTS = 3
"""As many faults in a row at the same step, with the same words, are no accident."""


def print_status(run_folder: Path, *, for_script: bool = False, launch: str = "") -> int:
    """Print what the folder says.

    Args:
        run_folder: of the run.
        for_script: the folder is known to be a run's, though no rank may have come far enough to write anything into it.
        launch: id of the one launch whose ranks are asked; empty: the newest, whichever it was.

    Returns:
        The exit code of ``glmv status --exit-code``.

    Raises:
        InputError: it is no run's folder.
    """
    config = None
    if (run_folder / "config.yaml").is_file():
        config = read_yaml(run_folder / "config.yaml")
    elif refusal := read_refusal(run_folder, launch):
        raise InputError(f"{run_folder}: cannot go on: {refusal}")
    elif not (run_folder if for_script else run_folder / FOLDER).is_dir():
        raise InputError(f"{run_folder}: holds no config.yaml; name the run_folder of a run")
    records = list(read_metrics(run_folder / METRICS_FILE))
    beats, refusal = read_heartbeats(run_folder, launch), read_refusal(run_folder, launch)
    state = f"cannot go on: {refusal}" if refusal else describe_state(beats, time.time())
    for name, text in _lines(run_folder, config, records, state):
        print(f"{name:<12}{text}")
    return REFUSED_CODE if refusal else _exit_code(run_folder, beats)


def _lines(
    run_folder: Path, config: Mapping[str, Any] | None, records: Sequence[Mapping[str, Any]], state: str
) -> Iterator[tuple[str, str]]:
    if config is None:
        yield "run", f"{run_folder} (no rank has come to its first step)"
    else:
        yield "run", f"{run_folder} (glmv {'rl' if 'prompts' in config else 'train'})"
    yield "state", state
    last = next((record for record in reversed(records) if "loss" in record or "expansion" in record), None)
    if last is not None and config is not None:
        yield from _progress(last, int(config["steps"]))
    evaluated = next((record for record in reversed(records) if "eval_loss" in record or "eval" in record), None)
    if evaluated is not None:
        yield "held out", _evaluation(evaluated)
    planned = next((record["planned"] for record in reversed(records) if "planned" in record), None)
    if planned is not None:
        yield "planned", f"{planned['step_s']:.2f} s a step, MFU {planned['mfu']:.1%}"
    compared = next((record for record in reversed(records) if "ranks" in record), None)
    if compared is not None:
        found = compared["ranks"]
        text = f"rank {found['rank']} computes longest, {found['ratio']:.2f} x the mean of its stage"
        yield "ranks", f"{text}; rank {found['waiting_rank']} waits {found['wait_s']:.2f} s a step for rows"
    yield from _checkpoints(run_folder)
    saved = next((record for record in reversed(records) if "checkpoint" in record), None)
    if saved is not None:
        cost = saved["checkpoint"]
        yield "save", f"training stood still for {cost['stall_s']:.2f} s of the {cost['seconds']:.2f} s that the last one took"
    copied = next((record for record in reversed(records) if "local_copy" in record), None)
    if copied is not None:
        stall_s = copied["local_copy"]["stall_s"]
        yield "local copy", f"training stood still for {stall_s:.2f} s for the last one, of step {copied['step']:,}"
    yield from _events(run_folder)
    faults = sum(sum(1 for _ in path.open("rb")) for path in run_folder.glob("bad_samples_*.jsonl"))
    if faults:
        yield "bad samples", f"{faults:,}, listed in {run_folder}/bad_samples_*.jsonl"


def describe_state(beats: Sequence[Heartbeat], now: float) -> str:
    """Whether the run goes on, and where it stands or stood.

    Args:
        beats: what every rank last said.
        now: seconds since the epoch.
    """
    if not beats:
        return "never started a rank"
    failed = [beat for beat in beats if beat.has_failed]
    if failed:
        first = min(failed, key=lambda beat: beat.heard)
        return f"failed {_ago(now - first.heard)}: rank {first.rank} at {first.place}: {first.failure}"
    last = max(beats, key=lambda beat: beat.heard)
    if all(beat.failure in (FINISHED, STOPPED) for beat in beats):
        word = "finished" if last.failure == FINISHED else "stopped on request"
        return f"{word} {_ago(now - last.heard)} at step {last.step}, {len(beats)} ranks"
    silent = [beat for beat in beats if not beat.failure and (now - beat.heard > SILENT_S or is_gone(beat))]
    lost = [beat for beat in beats if beat.failure == LOST_CONTACT]
    if len(silent) + len(lost) == len(beats) or lost:
        first = min(silent or lost, key=lambda beat: beat.heard)
        return f"broke off {_ago(now - last.heard)} at step {last.step}; first silent: rank {first.rank} at {first.place}"
    if silent:
        names = ", ".join(str(beat.rank) for beat in silent[:8])
        return f"running at step {last.step}, but silent: rank {names}{', ...' if len(silent) > 8 else ''}"
    behind = min(beats, key=lambda beat: beat.beats)
    return f"running, {len(beats)} ranks, heard of {_ago(now - last.heard)}; at {behind.place}"


def _progress(last: Mapping[str, Any], steps: int) -> Iterator[tuple[str, str]]:
    done = int(last["step"])
    seconds = float(last["seconds"]["total"] if "expansion" in last else last["step_s"])
    left = format_duration((steps - done) * seconds)
    yield "progress", f"step {done:,} of {steps:,}, {done / steps:.0%}; {seconds:.2f} s a step, {left} left"
    if "expansion" in last:
        reward, accuracy = (_mean(last.get(key, {})) for key in ("reward", "accuracy"))
        useful = last["expansion"]["useful_share"]
        yield "reward", f"{reward:.3f}, accuracy {accuracy:.1%}, useful groups {useful:.0%} (means over domains)"
        return
    loss = last["loss"]
    yield "loss", "the last step was skipped" if loss is None else f"{loss:.4f}, gradient norm {last['grad_norm'] or 0:.2f}"
    mfu = f", MFU {last['mfu']:.1%}" if last.get("mfu") else ""
    yield "speed", f"{format_count(last['tokens_per_s'])} useful tokens/s, {last['useful_share']:.0%} of all{mfu}"
    if last.get("skipped_steps"):
        yield "skipped", f"{last['skipped_steps']:,} steps whose gradients were not finite"


def _evaluation(record: Mapping[str, Any]) -> str:
    if "eval_loss" in record:
        return f"loss {record['eval_loss']:.4f} at step {record['step']:,}"
    accuracy = record["eval"]["accuracy"]
    listed = ", ".join(f"{domain} {value:.1%}" for domain, value in sorted(accuracy.items()))
    return f"accuracy {_mean(accuracy):.1%} at step {record['step']:,}: {listed}"


def _checkpoints(run_folder: Path) -> Iterator[tuple[str, str]]:
    complete = complete_folders(run_folder)
    if not complete:
        yield "checkpoint", "none"
        return
    step, folder = list(complete.items())[-1]
    saved = read_manifest(folder).get("saved_at")
    age = f", {_ago(time.time() - saved)}" if saved else ""
    yield "checkpoint", f"{folder.name} of step {step:,}{age}; {len(complete)} on disk"


def _events(run_folder: Path) -> Iterator[tuple[str, str]]:
    events = read_events(run_folder)
    starts, faults = ([event for event in events if event["kind"] == kind] for kind in ("start", "fault"))
    if len(starts) > 1:
        yield "restarts", f"{len(starts) - 1:,}; the last began at step {starts[-1]['step']:,}, {_ago_at(starts[-1])}"
    if faults:
        yield "faults", f"{len(faults):,}; the last {_ago_at(faults[-1])}: {faults[-1]['text']}"
    listed = [event for event in events if event["kind"] in ("hang", "skip", "rollback", "damaged", "unsaved", "order")]
    for event in listed[-3:]:
        yield event["kind"], f"{event['text']} ({_ago_at(event)})"


def _exit_code(run_folder: Path, beats: Sequence[Heartbeat]) -> int:
    """Whether a script should start the run again, after what its ranks last said."""
    if beats and all(beat.failure == FINISHED for beat in beats):
        return FINISHED_CODE
    # The last fault is told by the next start only; so the one in the heartbeats is counted here.
    faults = [(event["step"], event.get("fault")) for event in read_events(run_folder, ("fault",))]
    if (now := describe_end(beats)) is not None:
        faults.append(now)
    same = len(faults) >= _SAME_FAULTS and len(set(faults[-_SAME_FAULTS:])) == 1
    return REFUSED_CODE if same and any(beat.has_failed for beat in beats) else GOES_ON_CODE


def _ago_at(event: Mapping[str, Any]) -> str:
    return _ago(time.time() - event["time"])


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values) if values else 0.0


def _ago(seconds: float) -> str:
    return f"{format_duration(seconds)} ago" if seconds >= 1 else "now"
