"""The learning rate at the points that matter."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_glmv.config.training import OptimizerConfig
from megatron_glmv.training.schedule import learning_rate

CASES: list[tuple[str, dict[str, Any], int, dict[int, float]]] = [
    ("warm-up learns at once and peaks at its last update", {"warmup_steps": 4, "schedule": "constant"}, 10,
     {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 9: 1.0}),
    ("no warm-up", {"schedule": "constant"}, 3, {0: 1.0, 2: 1.0}),
    ("linear: the floor follows the last update", {"schedule": "linear", "min_lr": 0.2}, 4, {0: 1.0, 1: 0.8, 4: 0.2, 9: 0.2}),
    ("cosine: quarter, half-way and end", {"schedule": "cosine", "min_lr": 0.1}, 8,
     {0: 1.0, 2: 0.1 + 0.45 * (1 + 2**-0.5), 4: 0.55, 8: 0.1, 50: 0.1}),
    ("cosine after a warm-up", {"schedule": "cosine", "warmup_steps": 2}, 6, {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.5, 6: 0.0}),
    ("decay shorter than the run", {"schedule": "linear", "decay_steps": 2}, 10, {0: 1.0, 1: 0.5, 2: 0.0, 9: 0.0}),
    ("wsd holds, then falls over decay_steps", {"schedule": "wsd", "decay_steps": 4}, 10,
     {0: 1.0, 6: 1.0, 7: 0.75, 8: 0.5, 9: 0.25, 10: 0.0}),
    ("wsd: a tenth of the run by default", {"schedule": "wsd", "warmup_steps": 5}, 20, {4: 1.0, 18: 1.0, 19: 0.5, 20: 0.0}),
    ("wsd with a decay longer than the run", {"schedule": "wsd", "decay_steps": 9}, 4, {0: 1.0, 2: 0.5}),
    ("one step", {"schedule": "cosine"}, 1, {0: 1.0}),
    ("a warm-up as long as the run", {"schedule": "cosine", "warmup_steps": 2}, 2, {0: 0.5, 1: 1.0, 2: 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "steps", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_learning_rate(fields: dict[str, Any], steps: int, expected: dict[int, float]) -> None:
    """Each row: fields of the optimizer, length of the run, rate at some updates."""
    config = OptimizerConfig(lr=1.0, **fields)
    for step, rate in expected.items():
        assert learning_rate(step, config, steps) == pytest.approx(rate, abs=1e-12), step


def test_parts_keep_the_ratio_to_their_peak() -> None:
    """vision_lr and merger_lr scale the whole curve, floor included."""
    config = OptimizerConfig(lr=1e-4, min_lr=1e-5, vision_lr=2e-5, schedule="linear", warmup_steps=2)
    for step in range(12):
        text = learning_rate(step, config, 10, "text")
        assert learning_rate(step, config, 10, "vision") == pytest.approx(text / 5)
        assert learning_rate(step, config, 10, "merger") == pytest.approx(text)


def test_zero_rate_of_the_decoder() -> None:
    """A zero rate trains the vision tower alone without dividing by it."""
    config = OptimizerConfig(lr=0.0, vision_lr=1e-3, schedule="cosine")
    assert learning_rate(0, config, 10, "text") == 0.0
    assert learning_rate(0, config, 10, "vision") == 1e-3
