"""Parts sum to the whole, lie within one of their exact share, and meet it on average."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_glmv.rl.proportion import apportion


@pytest.mark.parametrize("seed", range(50))
def test_parts_are_exact_within_one(seed: int):
    random = np.random.default_rng(seed)
    weights = random.random(random.integers(1, 12)) * (random.random() < 0.8) + random.integers(0, 2, 1)
    weights = weights.tolist() if sum(weights) else [1.0]
    total = int(random.integers(0, 300))
    parts = apportion(total, weights, float(random.random()))
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) < 1
        assert weight or not part


def test_a_random_offset_gives_small_shares_their_due():
    random = np.random.default_rng(0)
    draws = np.array([apportion(3, [0.9, 0.1, 0.0, 0.02], float(random.random())) for _ in range(4000)])
    assert draws.mean(0) == pytest.approx(3 * np.array([0.9, 0.1, 0, 0.02]) / 1.02, abs=0.03)


@pytest.mark.parametrize("arguments", [([0.0, 0.0], 0.5), ([1.0, -0.1], 0.5), ([1.0], 1.0), ([], 0.5)])
def test_impossible_weights_are_refused(arguments: tuple[list[float], float]):
    with pytest.raises(ValueError, match="cannot divide"):
        apportion(3, *arguments)
