"""Rows dealt to replicas by cost: nothing lost, equally many each, and no worse than what can be had."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from megatron_glmv.data.deal import EVEN_ENOUGH, deal_rows


@pytest.mark.parametrize(("num_rows", "num_ranks"), [(4, 1), (4, 4), (12, 3), (64, 8), (1536, 256)])
def test_every_row_once_and_equally_many_each(num_rows: int, num_ranks: int) -> None:
    costs = np.random.default_rng(num_rows).lognormal(0, 1, num_rows)
    deal = deal_rows(costs, num_ranks)
    assert sorted(row for rows in deal for row in rows) == list(range(num_rows))
    assert {len(rows) for rows in deal} == {num_rows // num_ranks}
    assert all(rows == sorted(rows) for rows in deal)


def test_two_replicas_are_as_even_as_they_can_be() -> None:
    """Against every way to divide eight rows into two fours; swaps of single rows come within a twentieth."""
    random = np.random.default_rng(3)
    for _ in range(40):
        costs = random.lognormal(0, 1, 8)
        best = min(max(costs[list(half)].sum(), costs.sum() - costs[list(half)].sum()) for half in combinations(range(8), 4))
        found = max(costs[rows].sum() for rows in deal_rows(costs, 2))
        assert found <= 1.05 * best


def test_many_replicas_come_near_the_mean() -> None:
    """Costs as of rows with 0 to 40 pictures: in order the slowest replica of 32 is far above the mean, dealt it is not."""
    costs = 1 + 2 * np.random.default_rng(0).integers(0, 41, 256) / 40
    in_order = costs.reshape(32, -1).sum(1)
    dealt = np.array([costs[rows].sum() for rows in deal_rows(costs, 32)])
    assert in_order.max() / in_order.mean() > 1.15
    assert dealt.max() / dealt.mean() < 1 + 5 * EVEN_ENOUGH


def test_equal_rows_stay_in_any_order_and_the_deal_is_a_function_of_the_costs() -> None:
    costs = np.random.default_rng(1).lognormal(0, 1, 32)
    assert deal_rows(costs, 4) == deal_rows(costs.tolist(), 4)
    assert {len(rows) for rows in deal_rows([2.0] * 12, 4)} == {3}
