"""Small exchanges of all ranks about a checkpoint: what one of them meets, all of them hear."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_glmv.run_folder.checkpoint_folder import CheckpointError
from megatron_glmv.run_folder.checkpoint_sums import Sums


def over_ranks(value: int, operation: Any) -> int:
    """One whole number of every rank, reduced."""
    tensor = torch.tensor([value], dtype=torch.int64, device=torch.cuda.current_device())
    dist.all_reduce(tensor, op=operation)
    return int(tensor.item())


def sum_over_ranks(value: int) -> int:
    """Sum of one whole number of every rank."""
    return over_ranks(value, dist.ReduceOp.SUM)


def on_all_ranks(flag: bool) -> bool:
    """Whether a flag holds everywhere."""
    return bool(over_ranks(int(flag), dist.ReduceOp.MIN))


def on_first_rank(action: Callable[[], object]) -> None:
    """Do something on rank 0 while the others wait; a CheckpointError there is raised everywhere."""
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except CheckpointError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise CheckpointError(failure[0])


def first_fault(fault: str) -> str:
    """The first rank's that has one; empty: none has."""
    if on_all_ranks(not fault):
        return ""
    said: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(said, fault)
    return next(text for text in said if text)


def gather_sums(own: Mapping[str, tuple[int, int]]) -> Sums:
    """Every rank's sums, on rank 0; nothing on the others."""
    first = dist.get_rank() == 0
    gathered: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(dict(own), gathered, dst=0)
    return {name: found for part in gathered or () for name, found in part.items()}


def check_same_everywhere(folder: Path | None) -> None:
    """Refuse ranks that see different checkpoints, as a slow network disk may show them.

    Raises:
        CheckpointError: they do.
    """
    step = -1 if folder is None else int("".join(filter(str.isdigit, folder.name)) or 0)
    if over_ranks(step, dist.ReduceOp.MAX) != over_ranks(step, dist.ReduceOp.MIN):
        raise CheckpointError(f"{folder}: ranks see different newest checkpoints; is run_folder on a disk that all share?")
