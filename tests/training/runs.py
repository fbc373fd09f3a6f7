"""Small runs of `glmv train` on real ranks, started, watched and read as a user does."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from megatron_glmv.run_folder.events import read_events
from megatron_glmv.run_folder.heartbeat import Heartbeat, heartbeat_path, read_heartbeat
from tests.data.rows import LENGTH
from tests.stages import start_stage

STEPS, EVERY = 20, 4


def config_file(folder: Path, name: str, data: Path, **changes: Any) -> Path:
    """A small run on `data`; `changes` are top-level keys."""
    tree: dict[str, Any] = {
        "run_folder": str(folder / name),
        "steps": STEPS,
        "global_batch_rows": 4,
        "model": {"preset": "digits", "init_std": 0.08},
        "parallel": {"tensor": 2, "timeout_s": 60},
        "precision": {"dtype": "fp32", "layers": "torch"},
        "data": {"sequence_length": LENGTH, "decode_threads": 1, "sources": [{"name": "rows", "path": str(data)}]},
        "optimizer": {"lr": 0.002, "warmup_steps": 4},
        "checkpoint": {"every_steps": EVERY, "keep": 10},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree | changes), encoding="utf-8")
    return path


def train(file: Path, ranks: int, *overrides: str) -> tuple[int, str]:
    """Run `glmv train` to its end: exit code and output."""
    process = start_stage("train", file, ranks, *overrides)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def records_of(run: Path) -> list[dict[str, Any]]:
    """What the run has reported; of a line that is just being written, a part may be there."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_of(run: Path) -> dict[int, tuple[float, float, int]]:
    """Loss, gradient norm and trained tokens of every reported step."""
    return {r["step"]: (r["loss"], r["grad_norm"], r["trained_tokens"]) for r in records_of(run) if "loss" in r}


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until the run has reported `step`."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").is_file() and max(steps_of(run), default=0) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was never reported: {process.communicate()[0]}")


def wait_for_event(run: Path, kind: str, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until the run has recorded as many events of a kind."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if len(events_of(run, kind)) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{count} events {kind!r} were never recorded: {process.communicate()[0]}")


def wait_for_listening_ranks(launcher: subprocess.Popen[str], count: int) -> list[psutil.Process]:
    """Wait until so many ranks, which are still starting, take SIGTERM as a request."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and launcher.poll() is None:
        ranks = [rank for rank in ranks_of(launcher) if _catches(rank.pid, signal.SIGTERM)]
        if len(ranks) == count:
            return ranks
        time.sleep(0.01)
    raise AssertionError(f"{count} ranks never listened: {launcher.communicate()[0]}")


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The launcher's ranks that live."""
    found = []
    for child in psutil.Process(launcher.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            # Between fork and exec a child is still the launcher, whose words have --ranks.
            words = child.cmdline()
            if child.status() != psutil.STATUS_ZOMBIE and "megatron_glmv" in words and "--ranks" not in words:
                found.append(child)
    return found


def _catches(process: int, number: int) -> bool:
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return False
    [caught] = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught, 16) >> (number - 1) & 1)


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    """Events of one kind."""
    return [event for event in read_events(run) if event["kind"] == kind]


def heartbeat_of(run: Path, rank: int) -> Heartbeat:
    """What a rank last said."""
    beat = read_heartbeat(heartbeat_path(run, rank))
    assert beat is not None
    return beat
