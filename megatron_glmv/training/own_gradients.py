"""Which rank's own gradients are not finite: after the reduction over replicas, all of them have the fault of one.

Megatron's DistributedDataParallel offers a look at each bucket before it is reduced, but ends the process on a fault there.
Here the look leaves a mark on the device, without waiting for it, which is read when the step turns out to have a fault: one
pass over the gradients a step.

Source: megatron-core 0.16.1, distributed/param_and_grad_buffer.py (`check_grads`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_glmv.parallel import groups, platform
from megatron_glmv.run_folder.heartbeat import list_ranks


class OwnGradients:
    """Marks gradients of this rank that are not finite before they are reduced.

    Args:
        chunks: the wrapped model, built with ``check_for_nan_in_grad``.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        # Stays 0 as long as everything is finite: 0 x inf and 0 x nan are nan.
        self._mark = torch.zeros((), device=platform.device())
        for chunk in chunks:
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                group.check_grads = partial(self._look, group)

    def _look(self, group: Any, *, check_for_nan_or_inf: bool, check_for_large: bool) -> None:
        for bucket in group.buckets:
            smallest, largest = torch.aminmax(bucket.grad_data)  # a fifteenth of the time of an infinity norm on a CPU
            self._mark += 0.0 * smallest + 0.0 * largest

    def clear(self) -> None:
        """Forget; at the beginning of a step."""
        self._mark.zero_()

    def blame(self) -> str:
        """The ranks that have a mark, and their places; every rank must call it, once the step is known to have a fault."""
        own = "" if bool(self._mark.isfinite()) else groups.coordinates()
        said: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(said, own)
        found = [rank for rank, place in enumerate(said) if place]
        if not found:
            return "no rank's own gradients; their sum overflowed"
        # In the backward pass a fault travels to earlier pipeline stages and to tensor ranks, never to other replicas.
        return (
            f"those of {list_ranks(found)} ({'; '.join(said[rank] for rank in found[:4])}{'; ...' if len(found) > 4 else ''})"
        )
