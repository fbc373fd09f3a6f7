"""One layout's plan: memory of every stage, the schedule played through, traffic, and what a step and the stage take.

Source: plan/weights.py (exact state), plan/activations.py, plan/timing.py, plan/schedule.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_glmv.config.base import ConfigError
from megatron_glmv.config.rl_stage import RlConfig
from megatron_glmv.config.training import StageConfig, TrainConfig
from megatron_glmv.data.deal import deal_rows
from megatron_glmv.plan.activations import RowBytes, learning, row_bytes, text_layer
from megatron_glmv.plan.devices import Hardware
from megatron_glmv.plan.rows import RowSample
from megatron_glmv.plan.schedule import Timeline, most_in_flight, play
from megatron_glmv.plan.timing import StageTimes, data_rate, stage_rate, useful_flops
from megatron_glmv.plan.weights import GRADIENT_BYTES, StateBytes, chunk_parameters, state_bytes

MOST_PASSES = 200_000
"""Passes that are played for the skew between replicas, of those with most patches."""
MOST_REPLICAS = 16
DRAWN_STEPS = 4
"""Steps that are drawn for it."""
OPTIMIZER_BYTES = 34
"""Memory traffic of one element that a rank updates: gradient and its norm, fp32 weight, both moments, the bf16 weight."""
PROMPT_TOKENS = 512
"""Of a prompt in reinforcement learning, where nothing is known."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of the fullest rank of one pipeline stage.

    Attributes:
        layers: decoder layers of the stage.
        in_flight: rows of each chunk whose activations it holds at once.
        state: weights, gradients and optimizer.
        fp8: copies of weights.
        activations: kept for the backward pass, both towers.
        logits: of the last stage, kept and temporary.
        working: temporary tensors: what is computed again, gradients on their way, one weight's gradient.
        buffers: for messages and pictures.
        overhead: what is not torch's, and what torch's allocator cannot use.
    """

    layers: int
    in_flight: tuple[int, ...]
    state: StateBytes
    fp8: float
    activations: float
    logits: float
    working: float
    buffers: float
    overhead: float

    @property
    def total(self) -> float:
        """All of it."""
        moving = self.activations + self.logits + self.working + self.buffers
        return self.state.total + self.fp8 + moving + self.overhead


@dataclass(frozen=True)
class Traffic:
    """Bytes that the busiest rank of each axis sends in one step."""

    tensor: float
    context: float
    pipeline: float
    data: float


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
    exposed, sent = _data_traffic(config, hardware, data, times, timeline, rows)
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
        traffic=_traffic(config, times, each, rows.mean_patches, sent),
        row_flops=useful_flops(config, rows),
        useful_tokens=rows.mean_tokens,
    )


def stage_memory(
    config: StageConfig, gpus: int, hardware: Hardware, rows: RowSample, *, answer_tokens: float | None = None
) -> tuple[StageMemory, ...]:
    """Memory of every pipeline stage; arguments and errors as of `estimate`."""
    data = config.data_parallel(gpus)
    each = global_rows(config, data, answer_tokens) // data
    return tuple(_stage_memory(config, data, stage, each, hardware, rows) for stage in range(config.parallel.pipeline))


def global_rows(config: StageConfig, data: int, answer_tokens: float | None = None) -> int:
    """Rows of one step; in reinforcement learning all rows of an iteration's updates, as many as its answers fill."""
    if isinstance(config, TrainConfig):
        return config.global_batch_rows
    assert isinstance(config, RlConfig)
    answers = config.sampling.prompts_per_step * config.sampling.group_size
    length = answer_tokens or config.max_answer_tokens / 2
    unit = data * (config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1)
    rows = math.ceil(answers * (length + PROMPT_TOKENS) / config.sequence_length)
    return max(unit, -(-rows // unit) * unit)


def _stage_memory(config: StageConfig, data: int, stage: int, rows: int, hardware: Hardware, sample: RowSample) -> StageMemory:
    layout, shape = config.parallel, config.model.shape
    state = state_bytes(config, data, stage)
    held = most_in_flight(stage, layout.pipeline, layout.virtual_pipeline, rows)
    mean, worst = row_bytes(config, sample.mean_patches), row_bytes(config, sample.max_patches)
    first, last = stage == 0, stage == layout.pipeline - 1
    activations = 0.0
    for chunk, flying in enumerate(held):
        layers = len(layout.chunk_layers(shape.text.num_layers, stage, chunk))
        sees = first and chunk == 0
        activations += flying * (layers * mean.text + mean.entry[0 if sees else 1])
        if sees and flying:
            activations += (flying - 1) * (mean.vision + mean.merger) + worst.vision + worst.merger
    logits = worst.head + worst.head_working if last else 0.0
    working = _working(config, stage, worst)
    buffers = _buffers(config, sample.max_patches if first else 0.0)
    moving = activations + logits + working + buffers
    overhead = hardware.overhead_gb * 1e9 + hardware.fragmentation * moving
    layers = layout.stage_layers(shape.text.num_layers)[stage]
    return StageMemory(layers, held, state, _fp8_copies(config, stage), activations, logits, working, buffers, overhead)


def _working(config: StageConfig, stage: int, row: RowBytes) -> float:
    element = 2 if config.precision.dtype == "bf16" else 4
    chunks = range(config.parallel.virtual_pipeline)
    parameters = [p for chunk in chunks for p in chunk_parameters(config.model, config.parallel, stage, chunk)]
    largest = max((p.elements for p in parameters if p.learns), default=0)
    return row.working + element * largest if learning(config).text else 0.0


def _fp8_copies(config: StageConfig, stage: int) -> float:
    """FP8 weights of products, by rows and by columns, beside the bf16 ones."""
    kinds = {"text": config.precision.fp8_text, "vision": config.precision.fp8_vision, "merger": config.precision.fp8_vision}
    chunks = range(config.parallel.virtual_pipeline)
    parameters = [p for chunk in chunks for p in chunk_parameters(config.model, config.parallel, stage, chunk)]
    return 2.0 * sum(p.elements for p in parameters if p.matrix and kinds[p.part] != "off")


def _buffers(config: StageConfig, patches: float) -> float:
    """Gathered activations, messages of the pipeline and the context ranks, and a row's pictures."""
    layer, layout = text_layer(config, "te"), config.parallel
    gathered = layer.element * layer.width * layer.full * (layout.tensor > 1)
    messages = 2 * layer.element * layer.width * layer.part * (layout.pipeline > 1)
    keys = 4 * layer.element * layer.key * layer.full * (layout.context > 1)
    return gathered + messages + keys + patches * config.model.shape.vision.patch_dim


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


def _data_traffic(
    config: StageConfig, hardware: Hardware, data: int, times: StageTimes, timeline: Timeline, rows: RowSample
) -> tuple[float, float]:
    """Seconds of gradients and weights between replicas that nothing hides, and bytes that the busiest rank sends.

    Gradients of the first stage are sent while its last row's backward pass goes on; other stages are done earlier and send
    theirs meanwhile. With the distributed optimizer weights are gathered behind the next forward pass.
    """
    layout = config.parallel
    sharers = data * layout.context
    if sharers == 1:
        return 0.0, 0.0
    rate = data_rate(hardware, layout.tensor, sharers)
    element = 2 if config.precision.dtype == "bf16" else 4
    worst, most, gathered = 0.0, 0.0, 0.0
    for stage in range(layout.pipeline):
        chunks = range(layout.virtual_pipeline)
        parameters = [p for chunk in chunks for p in chunk_parameters(config.model, layout, stage, chunk)]
        moved = sum(p.elements for p in parameters if p.learns) * (sharers - 1) / sharers
        gradients, weights = 4 * moved, (element if layout.distributed_optimizer else 4) * moved
        seconds = times.chunk(stage, 0)
        hides = layout.overlap and (stage == 0 or layout.virtual_pipeline > 1)
        reduced = _hidden(gradients / rate, seconds.backward.of(rows.mean_patches), hardware.overlap, hides)
        if layout.distributed_optimizer:
            gather = _hidden(weights / rate, seconds.forward.of(rows.mean_patches), hardware.overlap, layout.overlap)
            gathered = max(gathered, gather)
        else:
            reduced += weights / rate
        worst = max(worst, timeline.ends[stage] + reduced - timeline.total)
        most = max(most, gradients + weights)
    return max(0.0, worst) + gathered + _averaged(config, hardware), most


def _averaged(config: StageConfig, hardware: Hardware) -> float:
    """Seconds in which tensor ranks that encoded other frames average the vision tower's gradients, at the end of a step."""
    layout = config.parallel
    if layout.vision != "images" or layout.tensor == 1:
        return 0.0
    first = chunk_parameters(config.model, layout, 0)
    elements = sum(p.elements for p in first if p.learns and p.part != "text")
    return 2 * (layout.tensor - 1) / layout.tensor * GRADIENT_BYTES * elements / data_rate(hardware, 1, layout.tensor)


def _hidden(sending: float, computing: float, overlap: float, hides: bool) -> float:
    """What remains of sending beside computing."""
    return max(sending - computing * overlap, sending * (1 - overlap)) if hides else sending


def _update_s(config: StageConfig, stages: tuple[StageMemory, ...], hardware: Hardware) -> float:
    """The optimizer's memory traffic, and gradients set to zero, on the fullest rank."""
    per_element = 12 if config.precision.dtype == "bf16" else 8
    rate = hardware.memory_gbs * 1e9 * hardware.memory_efficiency
    return max(OPTIMIZER_BYTES * stage.state.optimizer / per_element + stage.state.gradients for stage in stages) / rate


def _traffic(config: StageConfig, times: StageTimes, rows: int, patches: float, data: float) -> Traffic:
    layout = config.parallel
    sent = [times.sent(stage) for stage in range(layout.pipeline)]
    messages = 2 * layout.virtual_pipeline * times.message_bytes() if layout.pipeline > 1 else 0.0
    return Traffic(
        tensor=rows * max(each.tensor.of(patches) for each in sent),
        context=rows * max(each.context.of(patches) for each in sent),
        pipeline=rows * messages,
        data=data,
    )


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
