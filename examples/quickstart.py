"""The phases of the quickstart, each an ordinary command that a user could type, timed and summed up in summary.json.

A run that was interrupted goes on where it stopped; a finished one is trained anew on the data that is already there.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path("runs/quickstart")
CONFIG = Path("examples/quickstart.yaml")
RAW, PROCESSOR, ROWS = FOLDER / "data/raw", FOLDER / "data/processor", FOLDER / "data"
TRAIN, HF, SUMMARY = FOLDER / "train", FOLDER / "hf", FOLDER / "summary.json"
EVALUATION = FOLDER / "evaluation.json"

NUM_TRAIN, NUM_EVAL = 20000, 600
LENGTH, ALIGN = 1024, 2


class Phases:
    """Runs commands one after the other and remembers how long each kind took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, phase: str, *command: str | Path) -> None:
        """Run one command in the foreground; end the quickstart with its exit code if it fails."""
        words = [str(word) for word in command]
        print(f"\n[{phase}] {shlex.join(words)}", flush=True)
        started = time.monotonic()
        words[0] = str(Path(sys.executable).parent / words[0])
        code = subprocess.run(words, check=False).returncode
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.monotonic() - started, 1)
        if code:
            sys.exit(code)


def main(overrides: Sequence[str]) -> None:
    """Data, training, export, evaluation, summary."""
    if SUMMARY.is_file():
        for old in (TRAIN, SUMMARY, EVALUATION):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    shutil.rmtree(HF, ignore_errors=True)
    phases = Phases()
    phases.run("data", "glmv-data", "digits", RAW, "--train", str(NUM_TRAIN), "--eval", str(NUM_EVAL))
    phases.run("data", "glmv-data", "train-tokenizer", PROCESSOR, "--input", RAW / "train.jsonl", "--min-pixels", "1568")
    for split in ("train", "eval"):
        row = ("--processor", PROCESSOR, "--length", str(LENGTH), "--align", str(ALIGN))
        phases.run("pack", "glmv-data", "pack", RAW / f"{split}.jsonl", ROWS / split, *row)
    phases.run("train", "glmv", "train", CONFIG, *overrides, "--ranks", "4")
    phases.run("export", "glmv", "export", TRAIN, HF)
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count() or 1)
    phases.run("evaluate", "python", "examples/quickstart_evaluate.py", HF, RAW / "eval.jsonl", EVALUATION)
    summary = summarize(phases.seconds)
    SUMMARY.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"\n{summary['total_seconds']:.0f} s in all; {SUMMARY}, {TRAIN / 'loss.png'}; tensorboard --logdir {FOLDER}")


def summarize(seconds: dict[str, float]) -> dict[str, Any]:
    """What the run reached, from the files that its phases left."""
    report = json.loads(EVALUATION.read_text(encoding="utf-8"))
    config = yaml.safe_load((TRAIN / "config.yaml").read_text(encoding="utf-8"))
    lines = (TRAIN / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    speeds = sorted(record["tokens_per_s"] for record in records if "tokens_per_s" in record)
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    return {
        "tasks": report["tasks"],
        "shown": report["shown"],
        "parameters": report["parameters"],
        "steps": config["steps"],
        "layout": {key: config["parallel"][key] for key in ("tensor", "pipeline", "context", "sequence")},
        "tokens_per_s": round(speeds[len(speeds) // 2]) if speeds else math.nan,
        "eval_loss": losses[-1] if losses else math.nan,
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 1),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
