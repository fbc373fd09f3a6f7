"""What a run must remember beside its tensors: a few numbers, because the order of the data is a function of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def is_due(step: int, every_steps: int) -> bool:
    """Whether what is done every so many steps is due at one of them, counted from 1; every 0 steps is never."""
    return every_steps > 0 and step % every_steps == 0


@dataclass
class TrainState:
    """Counters of one run; equal on all ranks, saved with every checkpoint, continued by a resumed run."""

    step: int = 0
    """Steps done, the skipped ones included; the next step's number, counted from 0."""
    consumed_rows: int = 0
    """Packed rows read by all replicas together."""
    consumed_tokens: int = 0
    """Tokens of those rows that were trained on."""
    skipped_steps: int = 0
    """Steps whose updates were refused: gradients that were not finite, or a spike."""
    bad_samples: int = 0
    """Samples whose media could not be decoded."""
    batch: int = -1
    """Number of the next global batch in the order of the data; as `step`, unless batches were left out. -1: the same."""
    left_out: tuple[int, ...] = ()
    """Batches that a rollback leaves out, rising."""
    losses: tuple[float, ...] = ()
    """Of the newest applied steps, for the guard."""
    grad_norms: tuple[float, ...] = ()
    """The same steps'."""
    order: dict[str, Any] = field(default_factory=dict)
    """What decides about the order of the data: `RowStream.order`; empty: not known."""

    def __post_init__(self) -> None:
        if self.batch < 0:
            self.batch = self.step
        self.left_out, self.losses, self.grad_norms = tuple(self.left_out), tuple(self.losses), tuple(self.grad_norms)

    def next_batch(self) -> int:
        """The batch of the next step: those that are left out are jumped over."""
        number = self.batch
        while number in self.left_out:
            number += 1
        return number
