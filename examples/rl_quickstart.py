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
NUM_TRAIN, NUM_EVAL = 4000, 600
DOMAINS = {"read": "ocr", "count": "counting", "add": "counting", "point": "grounding", "watch": "video"}


def main(overrides: Sequence[str]) -> None:
    """Prompts, the start's answers, training, export, answers again, summary."""
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
    """Accuracy of every task and domain before and after, from the files that the phases left."""
    before, after = (json.loads(path.read_text(encoding="utf-8"))["tasks"] for path in (BEFORE, AFTER))
    tasks = {task: _compare(before, after, [task]) for task in DOMAINS}
    domains = {
        domain: _compare(before, after, [task for task, own in DOMAINS.items() if own == domain])
        for domain in sorted(set(DOMAINS.values()))
    }
    config = yaml.safe_load((TRAIN / "config.yaml").read_text(encoding="utf-8"))
    means = {when: sum(domain[when] for domain in domains.values()) / len(domains) for when in ("before", "after")}
    return {
        "tasks": tasks,
        "domains": domains,
        "mean": {**means, "gain": means["after"] - means["before"]},
        "iterations": config["steps"],
        "seed": config["seed"],
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 1),
    }


def _compare(before: dict[str, Any], after: dict[str, Any], tasks: Sequence[str]) -> dict[str, float]:
    """Accuracy over the questions of some tasks."""
    rates = {}
    for when, report in (("before", before), ("after", after)):
        rates[when] = sum(report[task]["right"] for task in tasks) / sum(report[task]["asked"] for task in tasks)
    return {**rates, "gain": rates["after"] - rates["before"]}


def table(summary: dict[str, Any]) -> list[str]:
    """The summary for people."""
    lines = [f"{'held-out accuracy, greedy':<28}{'before':>8}{'after':>8}{'gain':>8}"]
    rows = [*(("  " + name, row) for name, row in summary["domains"].items()), ("mean of the domains", summary["mean"])]
    for name, row in rows:
        lines.append(f"{name:<28}{row['before']:>8.1%}{row['after']:>8.1%}{100 * row['gain']:>+8.1f}")
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
