"""Packing: every sample once, never over a budget, nearly full rows, the same rows every time, and fast enough for millions."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pytest

from megatron_glmv.data.packing import pack_lengths


def long_tailed(count: int, most: int, median: float = 500, spread: float = 1.1, seed: int = 0) -> npt.NDArray[np.int64]:
    draws = np.random.default_rng(seed).lognormal(np.log(median), spread, count)
    return np.clip(draws.astype(np.int64), 16, most)


@pytest.mark.parametrize("seed", range(40))
def test_any_lengths_are_packed_once_within_both_budgets(seed: int) -> None:
    random = np.random.default_rng(seed)
    length, align = int(random.integers(8, 400)), int(random.choice([1, 2, 8]))
    count = int(random.integers(0, 300))
    most = max(1, int(length // align * align * random.choice([0.05, 0.3, 1.0])))
    lengths = random.integers(1, most + 1, count)
    budget = int(random.integers(1, 500)) if seed % 3 else None
    patches = random.integers(0, (budget or 500) + 1, count) if seed % 2 else None
    limits = {"patches": patches, "max_patches": budget if patches is not None else None}
    rows = pack_lengths(lengths, length, align=align, seed=seed, **limits)
    assert sorted(sample for row in rows for sample in row) == list(range(count))
    for row in rows:
        assert row == sorted(row)
        assert sum(-(-int(lengths[sample]) // align) * align for sample in row) <= length
        if limits["max_patches"] is not None:
            assert patches is not None
            assert sum(int(patches[sample]) for sample in row) <= limits["max_patches"]
    assert rows == pack_lengths(lengths, length, align=align, seed=seed, **limits)


@pytest.mark.parametrize("length", [8192, 32_768])
@pytest.mark.parametrize(("median", "spread"), [(500, 1.1), (1500, 0.7), (3000, 0.5)])
def test_long_tailed_lengths_fill_99_percent(length: int, median: float, spread: float) -> None:
    lengths = long_tailed(40_000, length, median, spread)
    rows = pack_lengths(lengths, length, align=8)
    assert lengths.sum() / (len(rows) * length) >= 0.99


@pytest.mark.parametrize(("length", "bound"), [(8192, 1.036), (32_768, 1.0048)])
def test_two_budgets_come_near_the_tighter_one(length: int, bound: float) -> None:
    """Text-only and picture-heavy samples mixed; what the tighter budget, here patches, needs is a lower bound on the rows.

    Measured 1.0322 and 1.0043 of it; 1.0403 and 1.0050 when rows are chosen by tokens alone.
    """
    lengths = long_tailed(40_000, length)
    share = np.random.default_rng(1).random(len(lengths))
    patches = np.where(share < 0.3, 0, np.minimum(4 * lengths * share, 1.5 * length - 1)).astype(np.int64)
    budget = int(1.5 * length)
    rows = pack_lengths(lengths, length, align=8, patches=patches, max_patches=budget)
    needed = max(lengths.sum() / length, patches.sum() / budget)
    assert len(rows) <= bound * needed


def test_a_hundred_thousand_samples_take_seconds() -> None:
    """A million take ten times as long: 6 s measured for one budget and 11 s for two, so the bound allows a slow machine."""
    lengths = long_tailed(100_000, 32_768)
    started = time.process_time()
    pack_lengths(lengths, 32_768, align=8, patches=2 * lengths, max_patches=2 * 32_768)
    assert time.process_time() - started < 6


def test_short_samples_of_different_lengths_share_rows() -> None:
    """Sorted packing would put equal lengths together: a row would then hold samples of one kind only."""
    lengths = np.repeat([20, 30, 40], 1000)
    rows = pack_lengths(lengths, 512)
    assert np.mean([len({int(lengths[sample]) for sample in row}) == 3 for row in rows]) > 0.9


def test_the_seed_changes_the_rows_and_the_order_of_long_ones_is_mixed() -> None:
    lengths = long_tailed(500, 8192)
    first, second = (pack_lengths(lengths, 8192, seed=seed) for seed in (0, 1))
    assert first != second
    longest = [max(int(lengths[sample]) for sample in row) for row in first]
    assert longest != sorted(longest, reverse=True)


@pytest.mark.parametrize(
    ("lengths", "patches", "message"),
    [([8, 65], [0, 0], "sample 1 takes 72 tokens, a row has 64"), ([8, 8], [4, 11], "sample 1 takes 11 patches, a row has 10"),
     ([8, 0], [0, 0], "sample 1 has no tokens")],
)  # fmt: skip
def test_a_sample_over_a_budget_is_refused(lengths: list[int], patches: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_lengths(lengths, 64, align=8, patches=patches, max_patches=10)
