"""Bytes of weights, gradients and optimizer state on every rank: exact, padding of Megatron's buffers included.

What learns lies in buffers, one a model chunk, in reverse order of registration. With the distributed optimizer parameters
start at multiples of 64 elements and buckets end at multiples of 128 and of the ranks that share the state; each of those ranks
keeps the fp32 copy and both moments of its even share of every bucket. The order is that of the torch spec; Transformer
Engine's layers register a norm before the matrix behind it, which moves bucket ends and padding by some hundred elements.

Source: megatron-core 0.16.1, distributed/param_and_grad_buffer.py (`_ParamAndGradBuffer`), distributed/
distributed_data_parallel.py (bucket size), optimizer/distrib_optimizer.py (`_build_model_gbuf_param_range_map`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np

from megatron_glmv.config.linears import adapted_layers
from megatron_glmv.config.lora import LoraConfig
from megatron_glmv.config.model import ModelConfig, ModelShape, Part
from megatron_glmv.config.parallel import ParallelConfig
from megatron_glmv.config.training import StageConfig
from megatron_glmv.config.weight_map import Entry, entries

GRADIENT_BYTES = 4
"""Gradients are summed and reduced in fp32."""
MOMENT_BYTES = 8
"""Both of Adam's moments in fp32."""
SAVED_BYTES = 12
"""Of an element that learns, in a checkpoint of the distributed optimizer: weight and both moments in fp32."""
PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128
BUCKET_ELEMENTS, BUCKET_ELEMENTS_A_RANK = 40_000_000, 1_000_000

_ATTENTION = ("linear_proj.weight", "linear_qkv.weight", "linear_qkv.bias", "linear_qkv.layer_norm_weight")
_MLP = ("linear_fc1.weight", "linear_fc1.layer_norm_weight", "linear_fc2.weight")
_LAYER = tuple(f"self_attention.{name}" for name in _ATTENTION) + tuple(f"mlp.{name}" for name in _MLP)
_POST_NORMS = ("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")
_ENTRY = ("patch_embed.weight", "patch_embed.bias", "position_embedding.weight", "post_conv_layernorm.weight")
_MERGER = ("downsample.weight", "downsample.bias", "proj.weight", "norm.weight", "norm.bias", "mlp.linear_fc1.weight",
           "mlp.linear_fc2.weight")  # fmt: skip


@dataclass(frozen=True)
class RankParameter:
    """One parameter of one tensor rank.

    Attributes:
        name: in the whole model.
        elements: that this rank holds.
        part: of the model.
        learns: whether it has a gradient.
        matrix: whether it is the weight of a layer's linear module, which FP8 products copy.
    """

    name: str
    elements: int
    part: Part
    learns: bool
    matrix: bool


@lru_cache(maxsize=8192)
def chunk_parameters(model: ModelConfig, layout: ParallelConfig, stage: int, chunk: int = 0) -> tuple[RankParameter, ...]:
    """Every parameter of one model chunk on each tensor rank, in the order in which Megatron registers them.

    Args:
        model: the architecture, what is frozen, and adapters.
        layout: how it is cut.
        stage: pipeline stage.
        chunk: of the virtual pipeline.
    """
    shape, lora = model.shape, model.lora
    table = entries(shape)
    found: list[RankParameter] = []
    for module, names in groupby(_names(shape, layout, stage, chunk), key=lambda name: name.rpartition(".")[0]):
        part: Part = "vision" if module.startswith("vision_model") else "merger" if module.startswith("vision_p") else "text"
        tensor = layout.tensor if part == "text" else layout.vision_tensor
        for own in (table[name] for name in names):
            elements = math.prod(own.shape) // (1 if own.split == "whole" else tensor)
            learns = lora is None and part not in model.freeze
            found.append(RankParameter(own.name, elements, part, learns, len(own.shape) == 2 and ".linear_" in own.name))
        if lora is not None and f"{module}.weight" in table:
            found += _adapter(table[f"{module}.weight"], part, lora, shape, tensor)
    return tuple(found)


def stage_parameters(config: StageConfig, stage: int) -> list[RankParameter]:
    """Every parameter of one pipeline stage on each tensor rank, all its chunks together."""
    chunks = range(config.parallel.virtual_pipeline)
    return [each for chunk in chunks for each in chunk_parameters(config.model, config.parallel, stage, chunk)]


def _adapter(weight: Entry, part: Part, lora: LoraConfig, shape: ModelShape, tensor: int) -> list[RankParameter]:
    """A and B of a linear module's adapters: model/lora.py says how tensor ranks share them."""
    layers = adapted_layers(lora, shape)
    adapters = sum(name.removesuffix(".weight") in layers for name in weight.hf_names)
    if not adapters:
        return []
    rows, columns = weight.shape
    a = adapters * lora.rank * columns // (tensor if weight.split == "columns" else 1)
    b = rows * lora.rank // (tensor if weight.split in ("rows", "gated_rows") else 1)
    module = weight.name.removesuffix(".weight")
    return [RankParameter(f"{module}.adapter.lora_{name}", size, part, True, False) for name, size in (("A", a), ("B", b))]


def _names(shape: ModelShape, layout: ParallelConfig, stage: int, chunk: int) -> Iterator[str]:
    """Names of a chunk's parameters; those of an adapter follow the other ones of its module."""
    first = stage == 0 and chunk == 0
    last = stage == layout.pipeline - 1 and chunk == layout.virtual_pipeline - 1
    if first:
        yield from (f"vision_model.{name}" for name in _ENTRY)
        for layer in range(shape.vision.num_layers):
            names = (name for name in _LAYER if not name.endswith("linear_qkv.bias"))
            yield from (f"vision_model.decoder.layers.{layer}.{name}" for name in names)
        yield "vision_model.decoder.final_layernorm.weight"
        yield from (f"vision_projection.{name}" for name in _MERGER)
        yield "language_model.embedding.word_embeddings.weight"
    for layer in layout.chunk_layers(shape.text.num_layers, stage, chunk):
        yield from (f"language_model.decoder.layers.{layer}.{name}" for name in (*_LAYER, *_POST_NORMS))
    if last:
        yield "language_model.decoder.final_layernorm.weight"
        yield "language_model.output_layer.weight"


@dataclass(frozen=True)
class Buffer:
    """Megatron's buffer of what learns in one chunk. Elements, in the buffer's order.

    Attributes:
        parameters: (start, end) of each parameter.
        buckets: (start, end) of each bucket, padding included.
    """

    parameters: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]

    @property
    def elements(self) -> int:
        """Of the whole buffer, padding included."""
        return self.buckets[-1][1] if self.buckets else 0

    @property
    def unpadded(self) -> int:
        """Elements without the padding at the ends of buckets."""
        return sum(max(last for first, last in self.parameters if first < end) - start for start, end in self.buckets)

    def owned(self, rank: int, ranks: int) -> int:
        """Elements of parameters, without padding, whose optimizer state lies on one of the ranks that share it."""
        if not self.buckets:
            return 0
        starts, ends = np.array(self.parameters, dtype=np.int64).T
        total = 0
        for start, end in self.buckets:
            share = (end - start) // ranks
            low = start + rank * share
            total += int((np.minimum(ends, low + share) - np.maximum(starts, low)).clip(min=0).sum())
        return total


def gradient_buffer(sizes: Sequence[int], *, sharers: int, distributed: bool, bucket_elements: int | None) -> Buffer:
    """Lay out the buffer of one chunk.

    Args:
        sizes: elements of the parameters that learn, in order of registration.
        sharers: data-parallel x context ranks.
        distributed: whether the optimizer is.
        bucket_elements: a bucket that has reached so many is closed; None: one bucket.
    """
    unit = math.lcm(sharers, BUCKET_ALIGNMENT) if distributed else 1
    aligned = PARAMETER_ALIGNMENT if distributed else 1
    parameters: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    start = bucket = 0
    for size in reversed(sizes):
        start = _round_up(start, aligned)
        end = start + size
        parameters.append((start, end))
        start = end
        if bucket_elements is not None and end - bucket >= bucket_elements:
            start = _round_up(end, unit)
            buckets.append((bucket, start))
            bucket = start
    if parameters and parameters[-1][1] > bucket:
        buckets.append((bucket, _round_up(parameters[-1][1], unit)))
    return Buffer(tuple(parameters), tuple(buckets))


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@dataclass(frozen=True)
class StateBytes:
    """Bytes that one rank holds from the first update on.

    Attributes:
        weights: parameters, in the buffers' padding too.
        gradients: fp32 buffers.
        optimizer: fp32 copies of the weights (bf16 only) and both moments.
    """

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.optimizer


def gathered_bytes(config: StageConfig, data: int, stage: int) -> int:
    """Bytes of host memory in which each rank gathers the state of its distributed optimizer, to save it and to load it.

    Each rank then writes or reads a share of them, but gathers all that the ranks of its replicas share.

    Source: megatron-core 0.16.1, optimizer/distrib_optimizer.py (`get_parameter_state_dp_zero`, ``return_on_all_ranks``).

    Args:
        config: the stage.
        data: data-parallel size.
        stage: pipeline stage of the rank.
    """
    layout = config.parallel
    if not layout.distributed_optimizer:
        return 0
    chunks = range(layout.virtual_pipeline)
    return SAVED_BYTES * sum(_buffer(config.model, layout, data, stage, chunk).unpadded for chunk in chunks)


def state_bytes(config: StageConfig, data: int, stage: int, rank: int = 0) -> StateBytes:
    """Bytes of one rank's state, exactly as Megatron allocates it.

    Args:
        config: the stage.
        data: data-parallel size.
        stage: pipeline stage of the rank.
        rank: its number among the data x context ranks that share the optimizer's state; they differ by padding only.
    """
    return _state_bytes(config.model, config.parallel, config.precision.dtype == "bf16", data, stage, rank)


@lru_cache(maxsize=8192)
def _state_bytes(model: ModelConfig, layout: ParallelConfig, halves: bool, data: int, stage: int, rank: int) -> StateBytes:
    element = 2 if halves else 4
    state = MOMENT_BYTES + (4 if halves else 0)
    sharers, distributed = data * layout.context, layout.distributed_optimizer
    weights = gradients = optimizer = 0
    for chunk in range(layout.virtual_pipeline):
        parameters = chunk_parameters(model, layout, stage, chunk)
        learning = _learning(parameters)
        buffer = _buffer(model, layout, data, stage, chunk)
        weights += element * sum(parameter.elements for parameter in parameters if not parameter.learns)
        weights += element * (buffer.elements if distributed else sum(learning))
        gradients += GRADIENT_BYTES * buffer.elements
        optimizer += state * (buffer.owned(rank, sharers) if distributed else sum(learning))
    return StateBytes(weights, gradients, optimizer)


def _buffer(model: ModelConfig, layout: ParallelConfig, data: int, stage: int, chunk: int) -> Buffer:
    """The gradients' buffer of one chunk."""
    sharers = data * layout.context
    buckets = layout.overlap and sharers > 1 and stage == 0 and chunk == 0
    most = max(BUCKET_ELEMENTS, BUCKET_ELEMENTS_A_RANK * data) if buckets else None
    sizes = _learning(chunk_parameters(model, layout, stage, chunk))
    return gradient_buffer(sizes, sharers=sharers, distributed=layout.distributed_optimizer, bucket_elements=most)


def _learning(parameters: Sequence[RankParameter]) -> list[int]:
    return [parameter.elements for parameter in parameters if parameter.learns]
