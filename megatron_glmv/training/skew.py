"""How unevenly the work of a step lay: the costliest replica, and the ranks with the costliest frames, over the mean.

All of a step's ranks wait for the slowest, so 1.05 here means that at best 95 % of their time is work.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_glmv.config.model import ModelShape
from megatron_glmv.sequence.cost import cost_model, deal_frames, frame_costs
from megatron_glmv.sequence.packed import PackedSequence


def replica_cost(rows: Sequence[PackedSequence], shape: ModelShape) -> float:
    """What training on a replica's rows costs, in tokens of the decoder's matrices."""
    model, total = cost_model(shape), 0.0
    for row in rows:
        lengths, patches = [end - start for _, start, end in row.documents], _patches(row)
        squares = sum(length**2 for length in lengths), sum(size**2 for size in patches)
        total += model.row(len(row.tokens), sum(lengths), row.num_trained, squares[0], sum(patches), squares[1])
    return total


def frame_loads(rows: Sequence[PackedSequence], shape: ModelShape, num_ranks: int) -> tuple[float, float]:
    """Costliest and mean share of the frames that ranks divide (`parallel.vision=images`), added over the rows."""
    costliest = mean = 0.0
    if num_ranks > 1:
        for row in rows:
            sizes = _patches(row)
            costs = frame_costs(shape.vision, sizes)
            shares = deal_frames(shape.vision, sizes, num_ranks)
            costliest += max(sum(costs[frame] for frame in share) for share in shares)
            mean += sum(costs) / num_ranks
    return costliest, mean


def describe_skew(replicas: Sequence[float], costliest: float, mean: float) -> dict[str, float]:
    """Costliest over mean; what cannot be uneven, or was not there, is left out.

    Args:
        replicas: cost of each replica's rows.
        costliest: of `frame_loads`, added over the replicas.
        mean: the same.
    """
    found = {}
    if len(replicas) > 1:
        found["replicas"] = max(replicas) * len(replicas) / sum(replicas)
    if mean:
        found["frames"] = costliest / mean
    return found


def _patches(row: PackedSequence) -> list[int]:
    """Patches of each frame of a row."""
    return [int(rows) * int(columns) for rows, columns in row.frames.tolist()]
