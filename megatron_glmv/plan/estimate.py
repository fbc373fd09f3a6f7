"""One layout's plan: memory of every stage, the schedule played through, traffic, and what a step and the stage take.

Source: plan/memory.py, plan/timing.py, plan/schedule.py, plan/traffic.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_glmv.config.base import ConfigError
from megatron_glmv.config.training import StageConfig, TrainConfig
from megatron_glmv.data.deal import deal_rows
from megatron_glmv.plan.devices import Hardware
from megatron_glmv.plan.memory import StageMemory, stage_memory
from megatron_glmv.plan.rows import RowSample, global_rows
from megatron_glmv.plan.schedule import Timeline, play
from megatron_glmv.plan.timing import StageTimes, stage_rate, useful_flops
from megatron_glmv.plan.traffic import Traffic, data_traffic, total_traffic
from megatron_glmv.plan.weights import gathered_bytes

MOST_PASSES = 200_000
"""Passes that are played for the skew between replicas, of those with most patches."""
MOST_REPLICAS = 16
DRAWN_STEPS = 4
"""Steps that are drawn for it."""
OPTIMIZER_BYTES = 34
"""Memory traffic of one element that a rank updates: gradient and its norm, fp32 weight, both moments, the bf16 weight."""


@dataclass(frozen=True)
class Plan:
    """What one layout on so many GPUs amounts to. Seconds and bytes.

    Attributes:
        config: the stage with this layout.
        hardware: the GPUs.
        gpus: how many.
        data: data-parallel size.
        rows: of the global batch.
        stages: memory of each pipeline stage.
        timeline: the schedule of one replica with mean rows.
        skew: how much longer the slowest of all replicas takes, with rows drawn at random; 1 where rows are all alike.
        exposed_s: traffic of gradients and weights that nothing hides.
        optimizer_s: the update.
        traffic: by axis.
        row_flops: operations that a mean row needs.
        useful_tokens: of a mean row.
    """

    config: StageConfig
    hardware: Hardware
    gpus: int
    data: int
    rows: int
    stages: tuple[StageMemory, ...]
    timeline: Timeline
    skew: float
    exposed_s: float
    optimizer_s: float
    traffic: Traffic
    row_flops: float
    useful_tokens: float

    @property
    def memory(self) -> float:
        """Of the fullest rank."""
        return max(stage.total for stage in self.stages)

    @property
    def host_memory(self) -> int:
        """Of a node whose ranks are those of the fullest stage, at a save and at a resume."""
        most = max(gathered_bytes(self.config, self.data, stage) for stage in range(len(self.stages)))
        return min(self.gpus, self.hardware.gpus_per_node) * most

    @property
    def fits(self) -> bool:
        """Whether every rank has the memory."""
        return self.memory <= self.hardware.memory_gb * 1e9

    @property
    def step_s(self) -> float:
        """One step."""
        return self.timeline.total * self.skew + self.exposed_s + self.optimizer_s

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, in the format that the run itself reports it in."""
        precision, hardware = self.config.precision, self.hardware
        fp8 = hardware.fp8_tflops if precision.fp8_text != "off" else None
        peak = fp8 or (hardware.bf16_tflops if precision.dtype == "bf16" else hardware.fp32_tflops)
        return self.row_flops * self.rows / (self.step_s * self.gpus * peak * 1e12)

    @property
    def tokens_s(self) -> float:
        """Useful tokens a second, all GPUs together."""
        return self.useful_tokens * self.rows / self.step_s

    @property
    def hours(self) -> float:
        """Of the whole stage, without evaluation, checkpoints and restarts."""
        return self.step_s * self.config.steps / 3600


def estimate(
    config: StageConfig,
    gpus: int,
    hardware: Hardware,
    rows: RowSample,
    *,
    answer_tokens: float | None = None,
    exact: bool = True,
    stages: tuple[StageMemory, ...] | None = None,
) -> Plan:
    """Plan one layout.

    Args:
        config: the stage, layout included.
        gpus: GPUs, a multiple of one replica.
        hardware: what they are.
        rows: what rows are like.
        answer_tokens: of an answer in reinforcement learning; None: half of the longest.
        exact: play the whole schedule and the skew of many replicas; otherwise a short schedule, continued.
        stages: of `stage_memory`, where they are known.

    Raises:
        ConfigError: the layout does not suit the model, the batch or the number of GPUs.
    """
    data = config.data_parallel(gpus)
    total = global_rows(config, data, answer_tokens)
    each = total // data
    stages = stages or stage_memory(config, gpus, hardware, rows, answer_tokens=answer_tokens)
    times = StageTimes(config, hardware, rows)
    patches = np.full(each, rows.mean_patches)
    timeline = _play(times, gpus, patches) if exact else _play_shortly(times, gpus, patches)
    skew = _skew(times, gpus, data, each, rows, timeline) if exact else 1.0
    exposed, sent = data_traffic(times, data, timeline, rows.mean_patches)
    return Plan(
        config=config,
        hardware=hardware,
        gpus=gpus,
        data=data,
        rows=total,
        stages=stages,
        timeline=timeline,
        skew=skew,
        exposed_s=exposed,
        optimizer_s=_update_s(config, stages, hardware),
        traffic=total_traffic(times, each, rows.mean_patches, sent),
        row_flops=useful_flops(config, rows),
        useful_tokens=rows.mean_tokens,
    )


def _play(times: StageTimes, gpus: int, patches: npt.NDArray[np.float64]) -> Timeline:
    """One replica's schedule over rows of so many patches."""
    layout, hardware = times.config.parallel, times.hardware
    stages, chunks = layout.pipeline, layout.virtual_pipeline
    seconds = {(stage, chunk): times.chunk(stage, chunk) for stage in range(stages) for chunk in range(chunks)}
    took = [
        {place: [cost.of(float(n)) for n in patches] for place, cost in ((p, getattr(s, way)) for p, s in seconds.items())}
        for way in ("backward", "forward")
    ]
    send = times.message_bytes() / stage_rate(hardware, gpus, stages) + 1e-6 * hardware.latency_us
    return play(stages, chunks, len(patches), lambda going, stage, chunk, row: took[going][stage, chunk][row], send)


def _play_shortly(times: StageTimes, gpus: int, patches: npt.NDArray[np.float64]) -> Timeline:
    """The schedule of equal rows from its first ones: behind them, every row takes what the slowest stage takes."""
    stages = times.config.parallel.pipeline
    short = 4 * stages
    if len(patches) <= short:
        return _play(times, gpus, patches)
    begun, more = _play(times, gpus, patches[:short]), len(patches) - short
    slowest = max(begun.busy) / short
    busy = tuple(value * len(patches) / short for value in begun.busy)
    return Timeline(begun.total + more * slowest, tuple(end + more * slowest for end in begun.ends), busy)


def _skew(times: StageTimes, gpus: int, data: int, each: int, rows: RowSample, mean: Timeline) -> float:
    """Time of the slowest of all replicas over that of one with mean rows, in steps of rows drawn at random."""
    config = times.config
    if rows.patches.min() == rows.patches.max() or times.vision == times.vision * 0.0:
        return 1.0
    dealt = not isinstance(config, TrainConfig) or config.data.even_ranks
    passes = 2 * each * config.parallel.pipeline * config.parallel.virtual_pipeline
    played = max(1, min(MOST_REPLICAS, MOST_PASSES // (passes * DRAWN_STEPS)))
    slowest = []
    for seed in range(DRAWN_STEPS):
        drawn = rows.draw(each * data, seed)
        replicas = drawn[np.array(deal_rows(drawn, data))] if dealt else drawn.reshape(data, each)
        dense = np.argsort(-replicas.sum(1), kind="stable")[:played]
        slowest.append(max(_play(times, gpus, replicas[replica]).total for replica in dense))
    return float(np.mean(slowest)) / mean.total


def _update_s(config: StageConfig, stages: tuple[StageMemory, ...], hardware: Hardware) -> float:
    """The optimizer's memory traffic, and gradients set to zero, on the fullest rank."""
    per_element = 12 if config.precision.dtype == "bf16" else 8
    rate = hardware.memory_gbs * 1e9 * hardware.memory_efficiency
    return max(OPTIMIZER_BYTES * stage.state.optimizer / per_element + stage.state.gradients for stage in stages) / rate


def gpus_that_divide(config: StageConfig, gpus: int) -> str:
    """Numbers of GPUs near `gpus` that the layout and the batch can use, for a message."""
    replica, batch = config.parallel.model_ranks, getattr(config, "global_batch_rows", gpus)
    sizes = [replica * data for data in range(1, batch + 1) if _suits(config, replica * data)]
    below = [size for size in sizes if size <= gpus][-1:]
    above = [size for size in sizes if size > gpus][:1]
    return " or ".join(f"{size:,}" for size in below + above) or "none"


def _suits(config: StageConfig, gpus: int) -> bool:
    try:
        config.data_parallel(gpus)
    except ConfigError:
        return False
    return True
