"""What the reinforcement learning quickstart says of itself, from its files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    for name in ("rl_quickstart", "quickstart"):
        sys.modules.pop(name, None)
    import rl_quickstart

    return rl_quickstart


def test_gains_are_last_less_first(example, tmp_path: Path) -> None:
    example.TRAIN.mkdir(parents=True)
    (example.TRAIN / "config.yaml").write_text("{steps: 3, seed: 7}")
    accuracies = [{"ocr/read": 0.5, "video/watch": 0.1}, {"ocr/read": 0.9}, {"ocr/read": 0.6, "video/watch": 0.4}]
    records = [{"step": step, "eval": {"subcategory_accuracy": found}} for step, found in enumerate(accuracies)]
    lines = [json.dumps(record) for record in [*records, {"step": 3, "reward": {"ocr": 1.0}}]]
    (example.TRAIN / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for path, accuracy in ((example.BEFORE, 0.25), (example.AFTER, 0.75)):
        path.write_text(json.dumps({"tasks": {"read": {"accuracy": accuracy, "chance": 0.1, "samples": 4}}}))
    summary = example.summarize({"rl": 1.5})
    assert summary["sampled"]["mean"] == pytest.approx({"before": 0.3, "after": 0.5, "gain": 0.2})
    assert summary["greedy"]["read"] == pytest.approx({"before": 0.25, "after": 0.75, "gain": 0.5})
    assert (summary["iterations"], summary["seed"], summary["total_seconds"]) == (3, 7, 1.5)
    lines = example.table(summary)
    assert any("watch" in line and "10.0%" in line and "+30.0" in line for line in lines)
