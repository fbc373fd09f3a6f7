"""Which rank is slow: seconds that each computes and waits for rows, compared with the ranks that do the same work.

In a synchronous step all ranks take equally long, because the fast ones wait; what tells them apart is the time in which they
do not wait. Megatron's own timers around forward and backward give it, which leaves out pipeline messages and the reduction of
gradients; tensor and context ranks wait for each other inside a layer, so of such a group all look slow. On CUDA the timers
wait for the device, so one step in `metrics.ranks_every_steps` is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_glmv.parallel import platform
from megatron_glmv.training.assemble import Assembly
from megatron_glmv.training.observer import StageTimers
from megatron_glmv.training.state import is_due


class Stragglers:
    """Compares the ranks of a run; create it on every rank.

    Args:
        assembly: this rank's model.
    """

    def __init__(self, assembly: Assembly) -> None:
        self._config = assembly.models[0].config
        self._every_steps = assembly.config.metrics.ranks_every_steps
        self._timers: StageTimers | None = None
        stage = parallel_state.get_pipeline_model_parallel_rank()
        stages = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=platform.device())
        own = torch.tensor([stage], dtype=torch.int64, device=platform.device())
        dist.all_gather_into_tensor(stages, own)
        self._stages: list[int] = stages.tolist()

    @contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Time the schedule of a step that is due; for all others this does nothing.

        Args:
            step: the step that begins, counted from 1.
        """
        if not is_due(step, self._every_steps):
            yield
            return
        standing = self._config.timers
        self._timers = standing if isinstance(standing, StageTimers) else StageTimers()
        self._config.timers = self._timers
        try:
            yield
        finally:
            self._config.timers = standing

    def compare(self, wait_s: float) -> dict[str, Any] | None:
        """The ranks of the step that was watched; None: it was not. Collective.

        Args:
            wait_s: seconds that this rank has waited for rows; in reinforcement learning, for their pictures.

        Returns:
            For the record: the rank whose computing took longest against the mean of its pipeline stage (`rank`, `ratio`,
            `compute_s`), and the one that waited longest for rows (`waiting_rank`, `wait_s`).
        """
        if self._timers is None:
            return None
        timers, self._timers = self._timers, None
        own = torch.tensor([timers.compute_seconds(), wait_s], dtype=torch.float64, device=platform.device())
        found = torch.zeros(2 * len(self._stages), dtype=torch.float64, device=platform.device())
        dist.all_gather_into_tensor(found, own)
        computed, waited = found.view(-1, 2).T.tolist()
        return compare_ranks(computed, waited, self._stages)


def compare_ranks(computed: list[float], waited: list[float], stages: list[int]) -> dict[str, Any]:
    """The slowest rank and the one that waits longest; see :meth:`Stragglers.compare`.

    Args:
        computed: seconds of each rank.
        waited: seconds of each rank.
        stages: pipeline stage of each rank; only ranks of one stage have the same work.
    """
    total: dict[int, float] = {}
    for seconds, stage in zip(computed, stages, strict=True):
        total[stage] = total.get(stage, 0.0) + seconds
    mean = {stage: seconds / stages.count(stage) for stage, seconds in total.items()}
    ratios = [seconds / max(mean[stage], 1e-9) for seconds, stage in zip(computed, stages, strict=True)]
    slowest, waiting = ratios.index(max(ratios)), waited.index(max(waited))
    return {
        "rank": slowest,
        "ratio": ratios[slowest],
        "compute_s": computed[slowest],
        "waiting_rank": waiting,
        "wait_s": waited[waiting],
    }
