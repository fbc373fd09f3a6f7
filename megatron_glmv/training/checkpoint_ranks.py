"""Small exchanges of all ranks about a checkpoint: what one of them meets, all of them hear."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_glmv.run_folder.checkpoint_folder import CheckpointError, DiskError
from megatron_glmv.run_folder.checkpoint_sums import Sums
from megatron_glmv.training.watchdog import still_moving

Answer = TypeVar("Answer")
_LOOK_S = 1.0
"""Between two looks at work that ranks wait for."""


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


def on_first_rank(action: Callable[[], Answer]) -> Answer:
    """Do something on rank 0 while the others wait; its answer, or its failure as a CheckpointError, is theirs too."""
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = action()
        except (CheckpointError, OSError) as error:
            told[1] = str(error)
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise CheckpointError(told[1])
    return told[0]


def on_every_rank(action: Callable[[], Answer]) -> Answer:
    """Read something on every rank, and return this rank's answer; what fails on one of them is raised on all.

    Raises:
        DiskError: the disk did not answer a rank, which is named with its host.
        CheckpointError: the first rank's.
    """
    answer, unread, refused = None, "", ""
    try:
        answer = action()
    except (OSError, DiskError, CheckpointError) as error:
        reason = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if isinstance(reason, CheckpointError):
            refused = str(reason)
        else:
            unread = f"rank {dist.get_rank()} on {socket.gethostname()}: {reason}; no checkpoint was set aside"
    if text := first_fault(unread):
        raise DiskError(text)
    if text := first_fault(refused):
        raise CheckpointError(text)
    return answer  # type: ignore[return-value]


def together(action: Callable[[Callable[[], None]], Answer]) -> Answer:
    """Do on every rank what takes long, in a thread, and return this rank's answer when all have ended.

    Args:
        action: is given what it must call after each block.
    """
    blocks, outcome = [0], Future[Answer]()

    def count() -> None:
        blocks[0] += 1

    def work() -> None:
        try:
            outcome.set_result(action(count))
        except Exception as error:  # noqa: BLE001 - raised again where the answer is taken
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="checkpoint", daemon=True)
    thread.start()
    wait_for_all(thread, lambda: blocks[0])
    return outcome.result()


def wait_for_all(thread: threading.Thread | None, num_blocks: Callable[[], int]) -> None:
    """Wait until every rank's thread has ended; as long as any of them comes further, no rank's watchdog ends the run.

    Args:
        thread: this rank's, if it has one.
        num_blocks: how far it has come.
    """
    seen = -1
    while True:
        if thread is not None:
            thread.join(_LOOK_S)
        found = sum_over_ranks(num_blocks())
        if on_all_ranks(thread is None or not thread.is_alive()):
            return
        if found > seen:
            still_moving()
        seen = found


def gather_faults(fault: str) -> list[str]:
    """Every rank's, on all of them; empty: it has none."""
    said = [""] * dist.get_world_size()
    if not on_all_ranks(not fault):
        dist.all_gather_object(said, fault)
    return said


def first_fault(fault: str) -> str:
    """The first rank's that has one; empty: none has."""
    return next((text for text in gather_faults(fault) if text), "")


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
