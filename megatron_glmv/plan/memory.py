"""Memory of every pipeline stage: state, what passes keep, temporary tensors, and what is not torch's.

Source: plan/weights.py (exact state), plan/activations.py, plan/schedule.py (rows whose activations a stage holds at once).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_glmv.config.training import StageConfig
from megatron_glmv.plan.activations import RowBytes, learning, most_going_on, row_bytes, text_layer
from megatron_glmv.plan.devices import Hardware
from megatron_glmv.plan.rows import RowSample, global_rows
from megatron_glmv.plan.schedule import most_in_flight
from megatron_glmv.plan.weights import StateBytes, stage_parameters, state_bytes


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


def stage_memory(
    config: StageConfig, gpus: int, hardware: Hardware, rows: RowSample, *, answer_tokens: float | None = None
) -> tuple[StageMemory, ...]:
    """Memory of every pipeline stage.

    Args:
        config: the stage, layout included.
        gpus: GPUs, a multiple of one replica.
        hardware: what they are.
        rows: what rows are like.
        answer_tokens: of an answer in reinforcement learning; None: half of the longest.

    Raises:
        ConfigError: the layout does not suit the model, the batch or the number of GPUs.
    """
    data = config.data_parallel(gpus)
    each = global_rows(config, data, answer_tokens) // data
    return tuple(_stage_memory(config, data, stage, each, hardware, rows) for stage in range(config.parallel.pipeline))


def _stage_memory(config: StageConfig, data: int, stage: int, rows: int, hardware: Hardware, sample: RowSample) -> StageMemory:
    layout, shape = config.parallel, config.model.shape
    state = state_bytes(config, data, stage)
    held = most_in_flight(stage, layout.pipeline, layout.virtual_pipeline, rows)
    mean = row_bytes(config, sample.mean_patches, going_on=most_going_on(config, sample.mean_trained))
    worst = row_bytes(config, sample.max_patches, going_on=most_going_on(config, sample.max_trained))
    first, last = stage == 0, stage == layout.pipeline - 1
    activations = 0.0
    for chunk, flying in enumerate(held):
        layers = len(layout.chunk_layers(shape.text.num_layers, stage, chunk))
        sees, ends = first and chunk == 0, last and chunk == layout.virtual_pipeline - 1
        activations += flying * ((layers - ends) * mean.text + mean.entry[0 if sees else 1])
        if sees and flying:
            activations += (flying - 1) * (mean.vision + mean.merger) + worst.vision + worst.merger
        if ends and flying:
            activations += (flying - 1) * mean.last + worst.last
    logits = worst.head + worst.head_working if last else 0.0
    working = _working(config, stage, worst)
    buffers = _buffers(config, sample.max_patches if first else 0.0)
    moving = activations + logits + working + buffers
    overhead = hardware.overhead_gb * 1e9 + hardware.fragmentation * moving
    layers = layout.stage_layers(shape.text.num_layers)[stage]
    return StageMemory(layers, held, state, _fp8_copies(config, stage), activations, logits, working, buffers, overhead)


def _working(config: StageConfig, stage: int, row: RowBytes) -> float:
    element = 2 if config.precision.dtype == "bf16" else 4
    largest = max((p.elements for p in stage_parameters(config, stage) if p.learns), default=0)
    return row.working + element * largest if learning(config).text else 0.0


def _fp8_copies(config: StageConfig, stage: int) -> float:
    """FP8 weights of products, by rows and by columns, beside the bf16 ones."""
    kinds = {"text": config.precision.fp8_text, "vision": config.precision.fp8_vision, "merger": config.precision.fp8_vision}
    return 2.0 * sum(p.elements for p in stage_parameters(config, stage) if p.matrix and kinds[p.part] != "off")


def _buffers(config: StageConfig, patches: float) -> float:
    """Gathered activations, messages of the pipeline and the context ranks, and a row's pictures."""
    layer, layout = text_layer(config, "te"), config.parallel
    gathered = layer.element * layer.width * layer.full * (layout.tensor > 1)
    messages = 2 * layer.element * layer.width * layer.part * (layout.pipeline > 1)
    keys = 4 * layer.element * layer.key * layer.full * (layout.context > 1)
    return gathered + messages + keys + patches * config.model.shape.vision.patch_dim
