"""What all ranks must decide alike at the end of a step, in one small collective.

A rank that skips an update, or stops, alone leaves the others waiting for it; so each says what it has seen, and all act alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Agreement:
    """What the ranks found together; equal on all of them."""

    finite: bool
    """Every gradient is finite everywhere."""
    accepted: bool
    """No rank's guard refuses the update."""
    stop: bool
    """Some rank was asked to stop."""


def agree(*, finite: bool = True, accepted: bool = True, stop: bool = False) -> Agreement:
    """Join what the ranks have seen; every rank must call it.

    Args:
        finite: the gradients that this rank has are finite.
        accepted: its guard has nothing against the update.
        stop: it was asked to stop.
    """
    if not dist.is_initialized():
        return Agreement(finite, accepted, stop)
    values = torch.tensor([finite, accepted, not stop], dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(values, op=dist.ReduceOp.MIN)
    all_finite, all_accept, no_stop = values.tolist()
    return Agreement(bool(all_finite), bool(all_accept), not no_stop)
