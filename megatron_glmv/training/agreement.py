"""What all ranks must decide alike at the end of a step, in one small collective.

A rank that skips an update, or stops, alone leaves the others waiting for it; so each says what it has seen, and all act alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

_NO_RANK = 2**31 - 1


@dataclass(frozen=True)
class Agreement:
    """What the ranks found together; equal on all of them."""

    finite: bool
    """Every gradient is finite everywhere."""
    accepted: bool
    """No rank's guard refuses the update."""
    stop: bool
    """Some rank was asked to stop."""
    source: int | None
    """The first rank whose own gradients, before any reduction, were not finite."""


def agree(*, finite: bool = True, own_finite: bool = True, accepted: bool = True, stop: bool = False) -> Agreement:
    """Join what the ranks have seen; every rank must call it.

    Args:
        finite: the reduced gradients that this rank has are finite.
        own_finite: those it computed itself were.
        accepted: its guard has nothing against the update.
        stop: it was asked to stop.
    """
    if not dist.is_initialized():
        return Agreement(finite and own_finite, accepted, stop, None if own_finite else 0)
    source = _NO_RANK if own_finite else dist.get_rank()
    said = [finite and own_finite, accepted, not stop, source]
    values = torch.tensor([int(value) for value in said], dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(values, op=dist.ReduceOp.MIN)
    all_finite, all_accept, no_stop, first = values.tolist()
    return Agreement(bool(all_finite), bool(all_accept), not no_stop, None if first == _NO_RANK else first)
