"""A run that goes on with another global batch or other data: where it goes on, and that it says so."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_glmv.data.order import GlobalOrder
from megatron_glmv.training.data_order import adopt_order, keep_rows
from megatron_glmv.training.state import TrainState


def order_of(rows: int, seed: int = 1, **sizes: int) -> GlobalOrder:
    sizes = sizes or {"a": 100, "b": 50}
    return GlobalOrder(list(sizes), [1.0] * len(sizes), list(sizes.values()), seed=seed, global_batch_rows=rows)


def saved(batch: int, order: GlobalOrder, **fields: Any) -> TrainState:
    return TrainState(step=batch, batch=batch, order=order.description, **fields)


@pytest.mark.parametrize(("before", "now", "batch"), [(4, 2, 20), (4, 8, 5), (4, 16, 3), (6, 4, 15), (4, 4, 10)])
def test_no_row_comes_twice_and_only_the_rest_of_a_batch_is_left_out(before: int, now: int, batch: int) -> None:
    first, then = order_of(before), order_of(now)
    state = saved(10, first)
    notes = keep_rows(state, now)
    assert state.next_batch() == batch
    seen = {number for step in range(10) for number in range(step * before, (step + 1) * before)}
    start = state.next_batch() * now
    assert start >= len(seen) and start - len(seen) < now
    assert list(then.step(batch)) == [then.at(start + number) for number in range(now)]
    assert len(notes) == (before != now)
    if notes:
        assert notes == [f"a step takes {now} rows, not {before}: going on at row {start} of the order of the data"]
    assert keep_rows(state, now) == [], "only once"
    assert adopt_order(state, then.description) == [], "said already"


def test_rows_that_are_left_out_stay_so() -> None:
    state = saved(10, order_of(4), left_out=(10, 12))
    keep_rows(state, 2)
    assert state.left_out == (20, 21, 24, 25)
    assert state.next_batch() == 22
    state = saved(10, order_of(4), left_out=(10, 12))
    keep_rows(state, 8)
    assert state.left_out == (5, 6)
    assert state.next_batch() == 7


def test_other_data_is_said_in_one_line() -> None:
    state = saved(3, order_of(4))
    now = order_of(4, seed=2, a=100, c=70).description
    [note] = adopt_order(state, now)
    assert note.endswith("left out: seed is 2, not 1; source 'b' is gone; source 'c' is new")
    assert state.order == now
    [note] = adopt_order(saved(3, order_of(4)), order_of(4, a=1200, b=50).description)
    assert note.endswith("source 'a' has 1,200 rows, not 100")
    [note] = adopt_order(saved(3, order_of(4)), order_of(4, b=50, a=100).description)
    assert note.endswith("sources are listed in another order")


def test_a_new_run_and_a_checkpoint_that_does_not_know_have_nothing_to_say() -> None:
    for state in (TrainState(), TrainState(step=3)):
        assert keep_rows(state, 8) == adopt_order(state, order_of(8).description) == []
        assert state.order["global_batch_rows"] == 8
