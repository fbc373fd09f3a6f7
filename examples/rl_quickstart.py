"""The phases of the reinforcement learning quickstart, each an ordinary command, timed and summed up in summary.json.

A run that was interrupted goes on where it stopped; a finished one is trained anew on the data that is already there.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from quickstart import HF as START
from quickstart import Phases

FOLDER = Path("runs/rl_quickstart")
CONFIG = Path("examples/rl_quickstart.yaml")
DATA, TRAIN, HF, SUMMARY = FOLDER / "data", FOLDER / "train", FOLDER / "hf", FOLDER / "summary.json"
BEFORE, AFTER = FOLDER / "before.json", FOLDER / "after.json"

MIXTURE = "read=0.2,count=0.2,add=0.2,point=0.2,watch=0.2"
NUM_TRAIN, NUM_EVAL = 16000, 1000


def main(overrides: Sequence[str]) -> None:
    """Prompts, the answers of the start, training, export, answers again, summary."""
    if SUMMARY.is_file():
        for old in (TRAIN, SUMMARY, AFTER):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    shutil.rmtree(HF, ignore_errors=True)
    phases = Phases()
    drawn = ("--seed", "1", "--mixture", MIXTURE, "--length-skew", "0")
    phases.run("prompts", "glmv-data", "digits", DATA, "--train", str(NUM_TRAIN), "--eval", str(NUM_EVAL), *drawn)
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count() or 1)
    if not BEFORE.is_file():
        phases.run("before", "python", "examples/quickstart_evaluate.py", START, DATA / "eval.jsonl", BEFORE)
    os.environ["OMP_NUM_THREADS"] = "1"
    phases.run("rl", "glmv", "rl", CONFIG, *overrides, "--ranks", "2")
    phases.run("export", "glmv", "export", TRAIN, HF)
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count() or 1)
    phases.run("after", "python", "examples/quickstart_evaluate.py", HF, DATA / "eval.jsonl", AFTER)
    summary = summarize(phases.seconds)
    SUMMARY.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print("\n" + "\n".join(table(summary)))
    print(f"\n{summary['total_seconds']:.0f} s in all; {SUMMARY}, {TRAIN / 'curves.png'}, {TRAIN / 'rollouts'}")


def summarize(seconds: dict[str, float]) -> dict[str, Any]:
    """Accuracy before and after, from the files that the phases left.

    `sampled` is that of the policy as it is trained, at temperature 1, from the run's own evaluations; `greedy` that of the
    exported folders under plain transformers.
    """
    config = yaml.safe_load((TRAIN / "config.yaml").read_text(encoding="utf-8"))
    records = map(json.loads, (TRAIN / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    evaluations = [record["eval"]["subcategory_accuracy"] for record in records if "eval" in record]
    sampled = [{name.rpartition("/")[2]: rate for name, rate in found.items()} for found in (evaluations[0], evaluations[-1])]
    reports = (json.loads(path.read_text(encoding="utf-8"))["tasks"] for path in (BEFORE, AFTER))
    tasks = [{task: found["accuracy"] for task, found in report.items()} for report in reports]
    return {
        "sampled": compare(*sampled),
        "greedy": compare(*tasks),
        "iterations": config["steps"],
        "seed": config["seed"],
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 1),
    }


def compare(before: dict[str, float], after: dict[str, float]) -> dict[str, dict[str, float]]:
    """Each name's accuracy before and after, and the mean of all."""
    pairs = {name: (before[name], after[name]) for name in sorted(before)}
    pairs["mean"] = tuple(sum(pair[when] for pair in pairs.values()) / len(pairs) for when in (0, 1))
    return {name: {"before": first, "after": last, "gain": last - first} for name, (first, last) in pairs.items()}


def table(summary: dict[str, Any]) -> list[str]:
    """The summary for people."""
    lines = []
    for key, title in (("sampled", "as sampled in training"), ("greedy", "greedy, plain transformers")):
        lines.append(f"{'held-out accuracy, ' + title:<46}{'before':>8}{'after':>8}{'gain':>8}")
        for name, row in summary[key].items():
            lines.append(f"  {name:<44}{row['before']:>8.1%}{row['after']:>8.1%}{100 * row['gain']:>+8.1f}")
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
