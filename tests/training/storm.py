"""A storm of SIGKILLs over one run with restarts, and what is left of it.

Every third kill strikes inside a save, every third at a random moment after a restart, its first seconds included, the others
after some steps. The run must end with the losses of one that nothing disturbed, bit for bit, and every checkpoint that counts
as complete must load.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from megatron_glmv.run_folder.checkpoint_folder import complete_folders
from tests.data.rows import write_rows
from tests.ranks import run_ranks
from tests.stages import start_stage
from tests.training.runs import config_file, events_of, ranks_of, steps_of

RANKS, EVERY = 2, 3
_STEPS_PER_KILL, _FEWEST_STEPS = 5, 80
MOMENTS = ("in a save", "after some steps", "at any moment")
_PATIENCE_S = 600.0


@dataclass
class Storm:
    """What was done, and what came of it."""

    kills: Counter[str] = field(default_factory=Counter)
    """By where the run was when they struck."""
    ranks: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    output: str = ""
    exit_code: int = 0


def run_file(folder: Path, name: str, kills: int) -> Path:
    """The configuration of a run long enough for so many kills; it saves in the background, and keeps everything."""
    if not (folder / "data").exists():
        write_rows(folder / "data", 23)
    return config_file(
        folder,
        name,
        folder / "data",
        steps=max(_STEPS_PER_KILL * kills, _FEWEST_STEPS),
        parallel={"tensor": 1, "timeout_s": 120},
        checkpoint={"every_steps": EVERY, "keep": 10000, "asynchronous": True},
        metrics={"tensorboard": False},
    )


def rage(file: Path, run: Path, kills: int, seed: int) -> Storm:
    """Run to the end through so many kills."""
    storm, dice, began = Storm(), random.Random(seed), time.monotonic()
    log = file.with_suffix(".log")
    process = start_stage("train", file, RANKS, "--restarts", str(2 * kills), output=log)
    try:
        for number in range(kills):
            moment = MOMENTS[number % len(MOMENTS)]
            victim = _wait_for(moment, run, process, dice)
            if victim is None:
                break  # the run has ended
            saving = any((run / "checkpoints").glob("*.partial"))
            os.kill(victim, signal.SIGKILL)
            storm.kills["in a save" if saving else "elsewhere"] += 1
            storm.ranks[number % RANKS] += 1
        storm.exit_code = process.wait(timeout=_PATIENCE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    storm.seconds, storm.output = time.monotonic() - began, log.read_text(encoding="utf-8", errors="replace")
    return storm


def _wait_for(moment: str, run: Path, process: subprocess.Popen[str], dice: random.Random) -> int | None:
    """Wait for the moment of the next kill; returns the process of a random rank."""
    lives, deadline = len(events_of(run, "start")), time.monotonic() + _PATIENCE_S
    patience = time.monotonic() + dice.uniform(0, 15) if moment == "at any moment" else deadline
    wanted = dice.randint(1, 2 * EVERY)
    first: int | None = None
    while process.poll() is None and time.monotonic() < min(patience, deadline):
        if len(events_of(run, "start")) > lives or first is not None or not lives:
            done = max(steps_of(run), default=0) if (run / "metrics.jsonl").is_file() else 0
            first = done if first is None else first
            if moment == "after some steps" and done >= first + wanted:
                break
            if moment == "in a save" and any((run / "checkpoints").glob("*.partial")):
                break
        time.sleep(0.002)
    time.sleep(dice.uniform(0, 0.15))
    ranks: list[psutil.Process] = []
    while not ranks and process.poll() is None and time.monotonic() < deadline:
        ranks = ranks_of(process)
    return dice.choice(ranks).pid if ranks else None


def load_all(rank: int, file: str, scratch: str) -> list[int]:
    """Load every complete checkpoint of the run with the loader of a resume; returns their steps."""
    from megatron_glmv.config.base import load
    from megatron_glmv.config.training import TrainConfig
    from megatron_glmv.parallel import groups
    from megatron_glmv.training.assemble import assemble, assemble_model
    from megatron_glmv.training.checkpoint import Checkpointer

    config = load(TrainConfig, [file])
    groups.initialize(config.parallel, config.seed)
    assembly = assemble(config, assemble_model(config))
    steps = []
    for step, folder in complete_folders(config.run_folder).items():
        alone = Path(scratch) / folder.name
        (alone / "checkpoints").mkdir(parents=True, exist_ok=True)
        link = alone / "checkpoints" / folder.name
        if rank == 0:
            link.symlink_to(folder)
        while not link.exists():
            time.sleep(0.001)
        changed = config.model_copy(update={"run_folder": alone})
        state = Checkpointer(changed, assembly.chunks, assembly.optimizer).load_latest()
        assert state is not None and state.step == step, f"{folder} holds step {state}"
        steps.append(step)
    return steps


def figures(folder: Path, storm: Storm) -> dict[str, object]:
    """What the storm has shown."""
    run = folder / "storm"
    loaded = run_ranks(load_all, RANKS, str(folder / "storm.yaml"), str(folder / "scratch"), timeout_s=1800)[0]
    return {
        "exit code": storm.exit_code,
        "kills": dict(storm.kills),
        "starts": len(events_of(run, "start")),
        "faults told": len(events_of(run, "fault")),
        "seconds": round(storm.seconds),
        "steps": len(steps_of(run)),
        "equal to the undisturbed run, bit for bit": steps_of(run) == steps_of(folder / "calm"),
        "complete checkpoints": len(complete_folders(run)),
        "of these loaded": len(loaded),
        "damaged": len(events_of(run, "damaged")),
        "left half-written": len(list((run / "checkpoints").glob("*.partial"))),
    }
