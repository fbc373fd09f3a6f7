"""Megatron's pipeline schedules played through with the time that each stage takes for each row.

(p - 1) / m is the bubble of equal stages and equal rows. Here stages differ (the vision tower stands on the first, the output
layer on the last) and so do rows, so the order of forward and backward passes is laid out as Megatron lays it out, and every
pass begins when its stage is free and its input has come.

Source: megatron-core 0.16.1, pipeline_parallel/schedules.py (`forward_backward_pipelining_without_interleaving`,
`forward_backward_pipelining_with_interleaving`, `get_pp_rank_microbatches`, `get_schedule_table`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple


class Pass(NamedTuple):
    """One forward or backward pass of one chunk over one row."""

    forward: bool
    row: int
    chunk: int


@lru_cache(maxsize=1024)
def stage_order(stage: int, stages: int, chunks: int, rows: int) -> tuple[Pass, ...]:
    """The passes of one stage, in Megatron's order.

    Args:
        stage: 0 .. stages - 1.
        stages: pipeline size.
        chunks: of each stage; above 1 the interleaved schedule.
        rows: micro-batches; for the interleaved schedule a multiple of the stages.
    """
    forward = [(row, chunk) for row, chunk in _table(stages, chunks, rows)]
    backward = [(row, chunks - 1 - chunk) for row, chunk in forward]
    total = rows * chunks
    if chunks == 1:
        warm_up = min(stages - stage - 1, total)
    else:
        warm_up = min((stages - stage - 1) * 2 + (chunks - 1) * stages, total)
    passes = [Pass(True, *step) for step in forward[:warm_up]]
    for step in range(total - warm_up):
        passes += [Pass(True, *forward[step + warm_up]), Pass(False, *backward[step])]
    return (*passes, *(Pass(False, *step) for step in backward[total - warm_up :]))


def _table(stages: int, chunks: int, rows: int) -> list[tuple[int, int]]:
    """(row, chunk) of each virtual micro-batch: as many rows as there are stages go through a chunk before the next one."""
    if chunks == 1:
        return [(row, 0) for row in range(rows)]
    return [
        (row, chunk)
        for start in range(0, rows, stages)
        for chunk in range(chunks)
        for row in range(start, min(start + stages, rows))
    ]


def most_in_flight(stage: int, stages: int, chunks: int, rows: int) -> tuple[int, ...]:
    """Rows of each chunk whose activations a stage holds at the moment when it holds most of them."""
    held = [0] * chunks
    best = tuple(held)
    for step in stage_order(stage, stages, chunks, min(rows, 4 * stages)):
        held[step.chunk] += 1 if step.forward else -1
        if sum(held) > sum(best):
            best = tuple(held)
    return best


@dataclass(frozen=True)
class Timeline:
    """What came of one replica's schedule. Seconds.

    Attributes:
        total: until the last stage is done.
        ends: when each stage is done.
        busy: computing time of each stage.
    """

    total: float
    ends: tuple[float, ...]
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they wait."""
        return 1 - sum(self.busy) / (len(self.busy) * self.total) if self.total else 0.0


PassSeconds = Callable[[bool, int, int, int], float]
"""(forward, stage, chunk, row) -> seconds of that pass."""


def play(stages: int, chunks: int, rows: int, seconds: PassSeconds, send_s: float = 0.0) -> Timeline:
    """Play one replica's schedule through.

    Args:
        stages: pipeline size.
        chunks: of each stage.
        rows: micro-batches.
        seconds: of every pass.
        send_s: of a message between stages.
    """
    orders = [stage_order(stage, stages, chunks, rows) for stage in range(stages)]
    done: dict[tuple[bool, int, int], float] = {}
    free, busy, next_pass = [0.0] * stages, [0.0] * stages, [0] * stages
    ready = list(range(stages))
    last = stages * chunks - 1
    while ready:
        stage = ready.pop()
        order = orders[stage]
        while next_pass[stage] < len(order):
            forward, row, chunk = order[next_pass[stage]]
            place = chunk * stages + stage
            if forward:
                before = (True, row, place - 1) if place else None
            else:
                before = (False, row, place + 1) if place < last else (True, row, place)
            came = 0.0 if before is None else done.get(before, -1.0)
            if came < 0.0:
                break
            remote = stages > 1 and before is not None and before[2] != place
            start = max(free[stage], came + (send_s if remote else 0.0))
            took = seconds(forward, stage, chunk, row)
            free[stage] = done[(forward, row, place)] = start + took
            busy[stage] += took
            next_pass[stage] += 1
            neighbour = ((place + 1) if forward else (place - 1)) % stages
            if neighbour != stage and neighbour not in ready:
                ready.append(neighbour)
    assert all(done_passes == len(order) for done_passes, order in zip(next_pass, orders, strict=True)), "the schedule is stuck"
    return Timeline(max(free), tuple(free), tuple(busy))
