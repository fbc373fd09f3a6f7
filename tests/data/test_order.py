"""The global order: a pure function of seed and step, the same for any number of replicas."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest

from megatron_glmv.data.order import Draw, GlobalOrder, permutation_keys, permute


def make_order(seed: int = 5, batch: int = 8, shuffle: bool = True) -> GlobalOrder:
    return GlobalOrder(["reading", "counting"], [3.0, 1.0], [37, 11], seed=seed, global_batch_rows=batch, shuffle=shuffle)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 255, 256, 257, 1_000, 4_097])
def test_permute_is_a_permutation(size):
    keys = permutation_keys(1, "reading", 0)
    assert sorted(permute(index, size, keys) for index in range(size)) == list(range(size))


def test_permute_mixes():
    """Over 2,000 epochs of 5 rows each of the 120 orders turns up, none far from its share of 16.7 (deviation 4.1)."""
    orders = Counter(
        tuple(permute(index, 5, permutation_keys(9, "reading", epoch)) for index in range(5)) for epoch in range(2_000)
    )
    assert len(orders) == 120
    assert max(orders.values()) < 40


def test_permute_keeps_no_neighbours():
    """Rows that follow each other on disk do not in the epoch: 1 in 100,000 pairs would by chance."""
    size, keys = 100_000, permutation_keys(2, "reading", 3)
    there = [permute(index, size, keys) for index in range(5_000)]
    assert sum(abs(a - b) == 1 for a, b in pairwise(there)) <= 3
    assert abs(sum(there) / len(there) / size - 0.5) < 0.02


def test_a_source_of_billions_costs_nothing():
    assert 0 <= permute(5_000_000_000, 7_000_000_001, permutation_keys(0, "web", 0)) < 7_000_000_001


def test_every_epoch_reads_every_row_once():
    order = make_order(batch=1)
    drawn: dict[tuple[int, int], list[int]] = {}
    for position in range(600):
        draw = order.at(position)
        drawn.setdefault((draw.source, draw.epoch), []).append(draw.row)
    for (source, epoch), rows in drawn.items():
        size = (37, 11)[source]
        if (source, epoch + 1) in drawn:
            assert sorted(rows) == list(range(size))
        else:
            assert len(set(rows)) == len(rows) <= size
    assert drawn[0, 0] != drawn[0, 1]


def test_replicas_divide_the_same_batch():
    order = make_order()
    for step in (0, 3, 1_000_003):
        whole = order.step(step)
        assert len(whole) == 8
        for size in (1, 2, 4, 8):
            parts = [order.step(step, rank, size) for rank in range(size)]
            assert tuple(draw for part in parts for draw in part) == whole


def test_an_uneven_split_is_refused():
    with pytest.raises(ValueError, match="8 rows does not divide by 3 replicas"):
        make_order().step(0, 0, 3)


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="'b' holds no row"):
        GlobalOrder(["a", "b"], [1.0, 1.0], [3, 0], seed=0, global_batch_rows=1)


def test_history_does_not_matter():
    steps = [make_order().step(step) for step in range(40)]
    late = make_order()
    assert [late.step(step) for step in (39, 0, 17)] == [steps[39], steps[0], steps[17]]


def test_unshuffled_keeps_the_order_on_disk():
    order = GlobalOrder(["a"], [1.0], [5], seed=0, global_batch_rows=3, shuffle=False)
    assert [order.at(position) for position in range(7)] == [Draw(0, p % 5, p // 5) for p in range(7)]


def test_seeds_and_names_give_other_orders():
    rows = [draw.row for draw in make_order(seed=5, batch=200).step(0) if draw.source == 0]
    assert rows != [draw.row for draw in make_order(seed=6, batch=200).step(0) if draw.source == 0]
    assert permutation_keys(5, "reading", 0) != permutation_keys(5, "counting", 0)


def test_the_order_is_the_same_in_another_process():
    """Python's own hash of a string changes with every process; the order must not."""
    code = (
        "from megatron_glmv.data.order import GlobalOrder;"
        "o = GlobalOrder(['reading', 'counting'], [3.0, 1.0], [37, 11], seed=5, global_batch_rows=8);"
        "print([(d.source, d.row, d.epoch) for s in (0, 1, 500) for d in o.step(s)])"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    order = make_order()
    assert printed.strip() == str([(d.source, d.row, d.epoch) for s in (0, 1, 500) for d in order.step(s)])


def test_the_order_is_frozen():
    """A checkpoint holds only a step, so a change of these numbers breaks the resume of every run already started."""
    drawn = [(draw.source, draw.row) for draw in make_order().step(12)]
    assert drawn == [(1, 9), (1, 5), (0, 0), (0, 14), (1, 10), (1, 7), (1, 3), (1, 0)]
