"""pass@k is unbiased; tiers and drop rules follow the counts."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from megatron_glmv.config.rl import GradingConfig
from megatron_glmv.rl.grading import TIERS, grade, pass_at_k, tier_of


@pytest.mark.parametrize(("n", "c", "k"), [(1, 0, 1), (1, 1, 1), (8, 3, 1), (8, 3, 4), (8, 5, 4), (8, 8, 8), (20, 1, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int, c: int, k: int):
    hits = sum(min(chosen) < c for chosen in combinations(range(n), k))
    assert pass_at_k(n, c, k) == pytest.approx(hits / comb(n, k), abs=1e-12)


def test_pass_at_k_is_unbiased():
    """Mean over 20,000 draws of 10 answers at p = 0.3; its standard error is 0.0024."""
    right = np.random.default_rng(0).binomial(10, 0.3, 20_000)
    assert np.mean([pass_at_k(10, int(c), 3) for c in right]) == pytest.approx(1 - 0.7**3, abs=0.01)


def test_pass_at_k_of_many_answers_does_not_overflow():
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1)])
def test_impossible_counts_are_refused(n: int, c: int, k: int):
    with pytest.raises(ValueError, match="needs"):
        pass_at_k(n, c, k)


def test_tiers_cover_all_rates():
    bounds = (0.1, 0.35, 0.65, 0.9)
    assert [TIERS[tier_of(rate, bounds)] for rate in (0.0, 0.1, 0.5, 0.65, 0.89, 0.9, 1.0)] == [
        "very_hard", "hard", "medium", "easy", "easy", "very_easy", "very_easy"
    ]  # fmt: skip


def test_several_models_count_alike():
    result = grade([(16, 16), (4, 0)], GradingConfig(k=4))
    assert (result.answers, result.pass_rate, result.pass_at_k, result.verdict) == (20, 0.5, 0.5, "keep")
    assert result.tier == "medium"


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ([(8, 8)], "trivial"),
        ([(8, 8), (8, 7)], "keep"),
        ([(8, 0), (4, 0)], "unsolvable"),
        ([(8, 0), (4, 1)], "keep"),
        ([(3, 3)], "unknown"),
        ([(0, 0)], "unknown"),
        ([], "unknown"),
    ],
)
def test_drop_rules(counts: list[tuple[int, int]], verdict: str):
    assert grade(counts, GradingConfig()).verdict == verdict


def test_drop_rules_can_be_switched_off():
    config = GradingConfig(drop_trivial=False, drop_unsolvable=False)
    assert {grade([(8, right)], config).verdict for right in (0, 8)} == {"keep"}
