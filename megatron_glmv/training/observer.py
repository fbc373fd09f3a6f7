"""A closer look at one step: norms and histograms of each part, and memory and idle time of each pipeline stage.

Looking costs a pass over weights and gradients and a few collectives, so it is done every `metrics.observe_every_steps` steps,
on every rank. Norms count each parameter once, as the global gradient norm does.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_glmv.parallel import platform
from megatron_glmv.training.assemble import Assembly
from megatron_glmv.training.observation import Histogram, Observation
from megatron_glmv.training.optimizer import PARTS
from megatron_glmv.training.state import is_due

_OCTAVES = (-32, 8)
"""Histograms have a bin for every power of two between these, for either sign; smaller values count as zero."""


class Observer:
    """Looks at steps of this rank; create it on every rank.

    Args:
        assembly: this rank's model and optimizer.
    """

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        self._every_steps = assembly.config.metrics.observe_every_steps
        self._timers: StageTimers | None = None

    @contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Time the schedule of a step that is due; for all others this does nothing.

        Args:
            step: the step that begins, counted from 1.
        """
        if not is_due(step, self._every_steps):
            yield
            return
        self._timers = StageTimers()
        config = self._assembly.models[0].config
        config.timers = self._timers
        try:
            yield
        finally:
            config.timers = None

    @torch.no_grad()
    def look(self, grad_norm: float) -> Observation | None:
        """What the step that was watched has left in weights, gradients and memory; None: it was not watched.

        Collective.

        Args:
            grad_norm: of the whole gradient before clipping, to which the parts' norms are scaled back.
        """
        if self._timers is None:
            return None
        timers, self._timers = self._timers, None
        numbers: dict[str, dict[str, float]] = {}
        histograms: dict[str, Histogram] = {}
        norms = _norms(self._parameters(gradients=False)), _norms(self._parameters(gradients=True))
        group = self._assembly.optimizer.chained_optimizers[0].get_grad_stats_parallel_group()
        squares = torch.stack(norms)
        dist.all_reduce(squares, group=group)
        weights, gradients = squares.sqrt().tolist()
        clipped = math.sqrt(sum(value**2 for value in gradients))
        scale = grad_norm / clipped if clipped and math.isfinite(grad_norm) and math.isfinite(clipped) else 1.0
        found = {part: number for number, part in enumerate(PARTS) if weights[number]}
        numbers["weight_norm"] = {part: weights[number] for part, number in found.items()}
        numbers["grad_norm"] = {part: gradients[number] * scale for part, number in found.items()}
        for name, is_gradient in (("weights", False), ("gradients", True)):
            counts = _histograms(self._parameters(gradients=is_gradient))
            dist.all_reduce(counts, group=group)
            factor = scale if is_gradient else 1.0
            histograms |= {f"{name}/{part}": _with_edges(counts[number], factor) for part, number in found.items()}
        numbers["memory_gb"] = _by_stage(_peak_memory() / 1e9)
        numbers["stage_idle"] = _by_stage(timers.idle_share())
        return Observation(numbers, histograms)

    def _parameters(self, *, gradients: bool) -> Iterator[tuple[int, Tensor]]:
        """This rank's share of every trained parameter, or of its gradient, with its part's number; each once in the job."""
        for inner in self._assembly.optimizer.chained_optimizers:
            if inner.is_stub_optimizer:
                continue
            for group in inner.param_groups:
                part = PARTS.index(group["is_decoupled_lr"])
                for parameter in group["params"]:
                    if not param_is_not_shared(parameter) or not param_is_not_tensor_parallel_duplicate(parameter):
                        continue
                    value = parameter.grad if gradients else parameter.detach()
                    if value is not None:
                        yield part, value


class StageTimers:
    """Stands in for Megatron's timers during one schedule: how long it took, and how much of that this stage computed.

    Source: megatron-core 0.16.1, pipeline_parallel/schedules.py (the names, and where they start and stop).
    """

    _COMPUTE = ("forward-compute", "backward-compute")
    _WHOLE = "forward-backward"

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._timers: dict[str, _Timer] = {}

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        """The timer of a name; those of single messages are not read, and do not wait for the device."""
        if name not in self._timers:
            self._timers[name] = _Timer(name in (*self._COMPUTE, self._WHOLE))
        return self._timers[name]

    def compute_seconds(self) -> float:
        """Seconds in which this stage computed."""
        return sum(self(name).seconds for name in self._COMPUTE)

    def idle_share(self) -> float:
        """Share of the schedules' time in which this stage did not compute."""
        whole = self(self._WHOLE).seconds
        return max(0.0, 1.0 - self.compute_seconds() / whole) if whole else 0.0


class _Timer:
    """Sums the seconds between its starts and stops."""

    def __init__(self, counts: bool) -> None:
        self.seconds, self._counts, self._begun = 0.0, counts, 0.0

    def start(self, barrier: bool = False) -> None:
        self._begun = self._now()

    def stop(self, barrier: bool = False) -> None:
        self.seconds += self._now() - self._begun

    def _now(self) -> float:
        if self._counts and platform.has_cuda():
            torch.cuda.synchronize()
        return time.perf_counter()


def _norms(parameters: Iterator[tuple[int, Tensor]]) -> Tensor:
    """[parts] float64: sums of squares on this rank."""
    squares = torch.zeros(len(PARTS), dtype=torch.float64, device=platform.device())
    for part, value in parameters:
        squares[part] += torch.linalg.vector_norm(value, dtype=torch.float32).double().square()
    return squares


def _histograms(parameters: Iterator[tuple[int, Tensor]]) -> Tensor:
    """[parts, bins] float64: counts on this rank; negative values from large to small, zero, positive ones."""
    low, high = _OCTAVES
    side = high - low
    counts = torch.zeros(len(PARTS), 2 * side + 1, dtype=torch.float64, device=platform.device())
    for part, value in parameters:
        flat = value.flatten().float()
        flat = flat[flat.isfinite()]
        _, exponent = torch.frexp(flat)  # |x| in [2^(exponent - 1), 2^exponent)
        place = (exponent - 1).clamp(max=high - 1) - low
        bins = torch.where(flat > 0, side + 1 + place, side - 1 - place)
        bins = torch.where((place < 0) | (flat == 0), side, bins)
        counts[part] += torch.bincount(bins, minlength=2 * side + 1)
    return counts


def _with_edges(counts: Tensor, factor: float) -> Histogram:
    """A row of counts with its bins' upper edges, both ends without a count cut off."""
    low, high = _OCTAVES
    positive = [2.0**power * factor for power in range(low, high + 1)]
    edges = [-edge for edge in reversed(positive[:-1])] + positive
    filled = counts.nonzero().flatten().tolist() or [high - low]
    chosen = slice(filled[0], filled[-1] + 1)
    return Histogram(counts[chosen].tolist(), edges[chosen])


def _peak_memory() -> float:
    """Bytes: the most that was allocated on the device since the last look; on a CPU the largest the process ever was."""
    if not platform.has_cuda():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    peak = float(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak


def _by_stage(value: float) -> dict[str, float]:
    """The largest value of each pipeline stage's ranks, by the stage's number; collective over all ranks."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    values = torch.zeros(stages, dtype=torch.float64, device=platform.device())
    values[parallel_state.get_pipeline_model_parallel_rank()] = value
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return {str(stage): found for stage, found in enumerate(values.tolist())}
