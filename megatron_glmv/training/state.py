"""What a run must remember beside its tensors: a few integers, because the order of the data is a function of them."""

from __future__ import annotations

from dataclasses import dataclass


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
    """Steps whose gradients were not finite."""
    bad_samples: int = 0
    """Samples whose media could not be decoded."""
