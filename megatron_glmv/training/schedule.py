"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state.

Source: the shapes are those of megatron-core 0.16.1, optimizer_param_scheduler.py, but counted in optimizer updates and with a
warm-up whose first update already learns.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from megatron_glmv.config.model import Part
from megatron_glmv.config.training import OptimizerConfig


class Rates(NamedTuple):
    """Largest and smallest learning rate of one part of the model."""

    peak: float
    floor: float


def learning_rate(step: int, config: OptimizerConfig, total_steps: int, part: Part = "text") -> float:
    """Learning rate of one optimizer update.

    The warm-up rises linearly to the peak, which its last update has; the decay starts from the peak and has the floor once its
    `decay_steps` updates are done, so that no update of the run is wasted on a rate of 0.

    Args:
        step: update, counted from 0.
        config: peaks, floor, shape and lengths.
        total_steps: updates of the whole run.
        part: vision, merger or text; they differ in their peak, not in their shape.

    Returns:
        The rate; greater than 0 at step 0 for a positive peak.
    """
    peak, floor = part_rates(config, part)
    warmup = config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    return floor + (peak - floor) * _remaining(step - warmup, config, total_steps - warmup)


def part_rates(config: OptimizerConfig, part: Part) -> Rates:
    """Peak and floor of a part; the floor keeps the decoder's ratio to the peak."""
    own = {"vision": config.vision_lr, "merger": config.merger_lr, "text": None}[part]
    peak = config.lr if own is None else own
    return Rates(peak, config.min_lr * peak / config.lr if config.lr else config.min_lr)


def _remaining(step: int, config: OptimizerConfig, steps: int) -> float:
    """Share of the distance between floor and peak that is left at `step` of the `steps` after the warm-up: 1 to 0."""
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        length = min(config.decay_steps or max(1, (steps + config.warmup_steps) // 10), steps)
        step -= steps - length
    else:
        length = config.decay_steps or steps
    done = min(max(step, 0) / max(length, 1), 1.0)
    if config.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0 - done
