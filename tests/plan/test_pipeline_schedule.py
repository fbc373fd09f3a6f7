"""The order of passes against Megatron's own functions, and the played schedule against bubbles that can be derived."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_glmv.plan.schedule import most_in_flight, play, stage_order

LAYOUTS = [(2, 1, 4), (4, 1, 8), (4, 1, 2), (8, 1, 32), (2, 2, 4), (4, 2, 8), (4, 5, 16), (4, 3, 4)]
"""Stages, chunks, rows."""


@pytest.mark.parametrize(("stages", "chunks", "rows"), LAYOUTS)
def test_order_is_megatrons(stages: int, chunks: int, rows: int) -> None:
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    for stage in range(stages):
        group = SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage)
        where = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None)
        total, _, warm_up, _ = get_pp_rank_microbatches(rows, chunks, stages, p2p_communicator=where)
        order = stage_order(stage, stages, chunks, rows)
        assert len(order) == 2 * total
        assert all(step.forward for step in order[:warm_up])
        assert [step.forward for step in order[warm_up : 2 * total - warm_up]] == [True, False] * (total - warm_up)
        table = get_schedule_table(rows, chunks, stages)
        assert [(step.row, step.chunk) for step in order if step.forward] == table
        assert [(step.row, chunks - 1 - step.chunk) for step in order if not step.forward] == table


@pytest.mark.parametrize(("stages", "chunks", "rows"), [case for case in LAYOUTS if case[2] >= case[0]])
def test_equal_stages_have_the_bubble_that_is_known(stages: int, chunks: int, rows: int) -> None:
    """Forward 1 and backward 2 on every stage: rows x 3, and (stages - 1) / chunks x 3 of filling and draining."""
    line = play(stages, chunks, rows, lambda forward, *place: (1 if forward else 2) / chunks)
    assert line.total == pytest.approx(3 * (rows + (stages - 1) / chunks))
    assert line.busy == pytest.approx([3.0 * rows] * stages)
    assert line.bubble == pytest.approx(1 - rows / (rows + (stages - 1) / chunks))


def test_a_slow_first_stage_sets_the_pace() -> None:
    """Stage 0 takes twice as long: it is busy from its first forward pass on, and all wait for it."""
    line = play(2, 1, 8, lambda forward, stage, *rest: (1 if forward else 2) * (2 - stage))
    assert line.busy == (48.0, 24.0)
    # It waits once, for the last stage's first forward and backward pass (3) less its own second forward pass (2).
    assert line.total == 49.0


def test_a_message_between_stages_takes_time() -> None:
    one_row = play(3, 1, 1, lambda forward, *place: 1.0, send_s=0.25)
    assert one_row.total == 6 + 4 * 0.25


def test_rows_held() -> None:
    assert [most_in_flight(stage, 4, 1, 16) for stage in range(4)] == [(4,), (3,), (2,), (1,)]
    assert most_in_flight(0, 4, 1, 2) == (2,)
    assert sum(most_in_flight(0, 4, 2, 16)) == 2 * 3 + 4 + 1
