"""What the global batch of a step held: tokens, frames, operations by tower, and how unevenly they lay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.training import StageConfig
from megatron_glmv.parallel import groups, platform
from megatron_glmv.plan.flops import Flops, row_flops
from megatron_glmv.sequence.packed import PackedSequence
from megatron_glmv.training.skew import describe_skew, frame_loads, replica_cost


@dataclass(frozen=True)
class BatchCounts:
    """Of the global batch; equal on all ranks."""

    useful_tokens: int
    """Tokens that are not padding."""
    images: int
    """Frames that the vision tower saw."""
    bad_samples: int
    """Samples whose pictures did not decode, and which were therefore not trained on."""
    flops: dict[str, float]
    """Operations that the model needs, forward and backward, by tower."""
    skew: dict[str, float]
    """Work of the costliest replica (`replicas`) and of the ranks with the costliest frames (`frames`) over the mean."""


def count_batch(config: StageConfig, shape: ModelShape, rows: Sequence[PackedSequence], bad: int) -> BatchCounts:
    """Count the global batch, in one collective over the replicas.

    Args:
        config: layout, frozen parts and adapters.
        shape: the model's numbers.
        rows: this replica's.
        bad: samples of them that did not decode.
    """
    model, layout = config.model, config.parallel
    flops = sum((row_flops(shape, row, model.freeze, model.lora) for row in rows), Flops())
    towers = {"vision": flops.vision, "merger": flops.merger, "text": flops.text, "head": flops.head}
    sharers = layout.tensor * layout.context if layout.vision == "images" else 1
    replicas = [0.0] * groups.data_size()
    replicas[groups.data_rank()] = replica_cost(rows, shape)
    counts = [sum(row.num_useful for row in rows), sum(len(row.frames) for row in rows), bad]
    parts = (counts, list(towers.values()), list(frame_loads(rows, shape, sharers)), replicas)
    joined = torch.tensor([value for part in parts for value in part], dtype=torch.float64, device=platform.device())
    dist.all_reduce(joined, group=parallel_state.get_data_parallel_group())
    counts, operations, frames, costs = (part.tolist() for part in joined.split([len(part) for part in parts]))
    useful, images, bad = map(int, counts)
    return BatchCounts(useful, images, bad, dict(zip(towers, operations, strict=True)), describe_skew(costs, *frames))
