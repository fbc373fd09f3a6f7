"""What a closer look at a step finds, as values that reports can take without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Histogram:
    """Counts of values.

    Attributes:
        counts: of each bin.
        edges: upper edges of the bins, rising.
    """

    counts: list[float]
    edges: list[float]


@dataclass(frozen=True)
class Observation:
    """What a closer look at a step found; equal on all ranks.

    Attributes:
        numbers: tree for the record: grad_norm and weight_norm by part (before clipping; a part without trained parameters is
            missing), peak memory_gb by pipeline stage (of the fullest rank; 10^9 bytes: the device's allocator, on a CPU the
            process), and stage_idle, the share of the schedule's time in which a stage did not compute.
        histograms: of weights and gradients by part, as "weights/text".
    """

    numbers: dict[str, dict[str, float]]
    histograms: dict[str, Histogram]
