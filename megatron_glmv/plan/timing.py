"""Seconds of the passes over one row on each stage, and what they send: a small model of the hardware, every part of it stated.

A pass is the sum of its matrix products, its attention, the memory traffic of everything element by element, and the messages
that computation waits for. Each is an amount over a peak times an assumed efficiency (plan/devices.py); nothing is fitted.
Everything is linear in the patches of a row, for frames are of one size in a plan, so a pass is a constant and a slope.

Only trained tokens go on behind the last attention. Every rank is taken to have its even share of those of a mean row; where a
row's are with some of its tensor or context ranks, those set the pace, and the last stage takes longer than planned.

Source: plan/flops.py for the operations; the volumes of ring collectives; model/glm4v.py (how ranks share the vision tower);
megatron-core 0.16.1, tensor_parallel/layers.py (what is gathered and scattered, forward and backward).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from functools import lru_cache

from megatron_glmv.config.model import ModelConfig
from megatron_glmv.config.training import StageConfig
from megatron_glmv.plan.activations import Layer, layer_spec, learning, text_layer, vision_layer
from megatron_glmv.plan.devices import Hardware
from megatron_glmv.plan.flops import Flops, forward_flops, training_flops
from megatron_glmv.plan.rows import RowSample
from megatron_glmv.plan.weights import chunk_parameters

FORWARD_PASSES, BACKWARD_PASSES = 2.0, 3.0
"""How often the bytes that a layer keeps go through memory outside of its products: written and read, and with gradients."""
FLASH_BACKWARD = 1.25
"""Fused attention computes the scores again: five products where four are counted."""
ACCUMULATED_BYTES = 10
"""Memory traffic of one element of a gradient that is added to the fp32 buffer: 2 and 4 bytes read, 4 written."""


@dataclass(frozen=True)
class Cost:
    """Of one row: a constant, and a slope over its patches."""

    constant: float = 0.0
    per_patch: float = 0.0

    def of(self, patches: float) -> float:
        """For a row of so many patches."""
        return self.constant + self.per_patch * patches

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.constant + other.constant, self.per_patch + other.per_patch)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.constant * factor, self.per_patch * factor)


@dataclass(frozen=True)
class Seconds:
    """Forward and backward pass of something over one row."""

    forward: Cost = Cost()
    backward: Cost = Cost()

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(self.forward * factor, self.backward * factor)


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends for one row (and receives as many)."""

    tensor: Cost = Cost()
    context: Cost = Cost()

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.tensor + other.tensor, self.context + other.context)

    def __mul__(self, factor: float) -> Sent:
        return Sent(self.tensor * factor, self.context * factor)


class StageTimes:
    """Times and traffic of every chunk of a layout on given hardware and rows."""

    def __init__(self, config: StageConfig, hardware: Hardware, rows: RowSample) -> None:
        self.config, self.hardware = config, hardware
        layout = config.parallel
        self._work = _work(config.model, config.sequence_length, rows.mean_tokens, rows.document_tokens, rows.frame_patches)
        self._link = _rate(hardware, layout.tensor)
        self._context_link = _rate(hardware, layout.tensor * layout.context)
        trained = rows.mean_trained
        self.text, self.text_sent = self._text(text_layer(config, "te"), 0.0)
        last = text_layer(config, "te", trained / layout.context)
        self.last, self.last_sent = self._text(last, config.sequence_length - trained)
        self.vision, self.vision_sent = self._vision()
        self.head = self._head(trained)

    def chunk(self, stage: int, chunk: int = 0) -> Seconds:
        """Forward and backward of one chunk."""
        layout, shape = self.config.parallel, self.config.model.shape
        ends = stage == layout.pipeline - 1 and chunk == layout.virtual_pipeline - 1
        total = self.text * (len(layout.chunk_layers(shape.text.num_layers, stage, chunk)) - ends)
        if stage == 0 and chunk == 0:
            total += self.vision
        if ends:
            total += self.last + self.head
        learning_elements = sum(p.elements for p in chunk_parameters(self.config.model, layout, stage, chunk) if p.learns)
        added = ACCUMULATED_BYTES * learning_elements / _memory_rate(self.hardware)
        return total + Seconds(backward=Cost(added))

    def sent(self, stage: int) -> Sent:
        """Bytes of a stage for one row, over all its chunks."""
        layout = self.config.parallel
        ends = stage == layout.pipeline - 1
        layers = layout.stage_layers(self.config.model.shape.text.num_layers)[stage] - ends
        total = self.text_sent * layers + (self.vision_sent if stage == 0 else Sent())
        return total + self.last_sent if ends else total

    def message_bytes(self) -> float:
        """Of one row between two pipeline stages."""
        layer = text_layer(self.config, "te")
        return layer.element * layer.width * layer.part

    def _product_rate(self, fp8: str) -> float:
        hardware = self.hardware
        if fp8 != "off" and hardware.fp8_tflops is not None:
            return hardware.fp8_tflops * hardware.fp8_efficiency * 1e12
        return _peak(self.config, hardware) * hardware.matmul_efficiency

    def _layer(self, layer: Layer, forward: tuple[float, float], backward: tuple[float, float], fp8: str, how: str) -> Seconds:
        """One layer from (products, attention) forward and backward, all of this rank."""
        products, attention = self._product_rate(fp8), _peak(self.config, self.hardware) * self.hardware.attention_efficiency
        kept = replace(layer, kind="te").kept("none") / _memory_rate(self.hardware)
        going = forward[0] / products + forward[1] / attention + FORWARD_PASSES * kept
        back = backward[0] / products + FLASH_BACKWARD * backward[1] / attention
        if backward[0] + backward[1]:
            back += BACKWARD_PASSES * kept
            back += going if how == "full" else forward[1] / attention if how == "selective" else 0.0
        return Seconds(Cost(going), Cost(back))

    def _collectives(self, layer: Layer, tensor: int, passes: bool, how: str) -> tuple[Seconds, float]:
        """What a layer exchanges with the other tensor ranks: seconds, and bytes of both passes."""
        hardware = self.hardware
        if tensor == 1:
            return Seconds(), 0.0
        volume = 2 * (tensor - 1) / tensor * (layer.full + layer.behind) * layer.width * layer.element
        going = volume / self._link
        # Gathered once more for the gradients of the weights, beside the products.
        again = volume / 2 * (layer.part < layer.full)
        back = (going + again / self._link * (1 - hardware.overlap)) * passes + (going if how == "full" and passes else 0.0)
        sent = volume * (1 + passes * (1 + (how == "full"))) + again * passes
        return Seconds(Cost(going), Cost(back)), sent

    def _text(self, layer: Layer, spared: float) -> tuple[Seconds, Sent]:
        """A mean layer of the decoder, whose MLP sees all tokens of a row but so many."""
        config, work = self.config, self._work
        how, depth = config.recompute.text, config.model.shape.text.num_layers
        ranks = config.parallel.tensor * config.parallel.context
        forward, backward = (
            (max(0.0, row.text_linear / depth - spared * token.text_linear) / ranks, row.text_attention / depth / ranks)
            for row, token in ((work.forward, work.forward_trained), (work.backward, work.backward_trained))
        )
        seconds = self._layer(layer, forward, backward, config.precision.fp8_text, how)
        collectives, sent = self._collectives(layer, config.parallel.tensor, sum(backward) > 0, how)
        context, keys_sent = self._keys(layer, sum(backward) > 0, how)
        return seconds + collectives + context + self._latency(config.parallel.tensor), Sent(Cost(sent), Cost(keys_sent))

    def _keys(self, layer: Layer, passes: bool, how: str) -> tuple[Seconds, float]:
        """Keys and values that go round the context ranks, mostly beside attention; gradients of them on the way back."""
        context = self.config.parallel.context
        if context == 1:
            return Seconds(), 0.0
        volume = (context - 1) * layer.full * 2 * layer.key * layer.element
        waits = (volume / self._context_link + (context - 1) * 1e-6 * self.hardware.latency_us) * (1 - self.hardware.overlap)
        times = passes * (2 + (how != "none"))
        return Seconds(Cost(waits), Cost(waits * times)), volume * (1 + times)

    def _vision(self) -> tuple[Seconds, Sent]:
        """The tower and the merger over one patch of a row, as slopes."""
        config, work, layout = self.config, self._work, self.config.parallel
        how, depth = config.recompute.vision, config.model.shape.vision.num_layers
        layer = vision_layer(config, 1.0, "te")
        # Tensor ranks share the work of a patch, or tensor and context ranks share the patches.
        ranks = layout.tensor * (layout.context if layout.vision == "images" else 1)
        going, back = _scale(work.forward_patch, 1 / ranks), _scale(work.backward_patch, 1 / ranks)
        forward = (going.vision_linear / depth, going.vision_attention / depth)
        backward = (back.vision_linear / depth, back.vision_attention / depth)
        each = self._layer(layer, forward, backward, config.precision.fp8_vision, how)
        collectives, sent = self._collectives(layer, layout.vision_tensor, sum(backward) > 0, how)
        rate = self._product_rate(config.precision.fp8_vision)
        gather, gathered = self._features(back.vision + back.merger > 0)
        tower = (each + collectives) * depth + Seconds(Cost(going.merger / rate), Cost(back.merger / rate)) + gather
        slope = Seconds(Cost(0.0, tower.forward.constant), Cost(0.0, tower.backward.constant))
        return slope + self._latency(layout.vision_tensor) * depth, Sent(Cost(0.0, sent * depth + gathered))

    def _features(self, passes: bool) -> tuple[Seconds, float]:
        """One patch's share of the features that ranks with dealt frames gather, and of their gradients on the way back."""
        layout, vision = self.config.parallel, self.config.model.shape.vision
        ranks = layout.tensor * layout.context
        if layout.vision != "images" or ranks == 1:
            return Seconds(), 0.0
        element = 2 if self.config.precision.dtype == "bf16" else 4
        volume = (ranks - 1) / ranks * element * vision.out_hidden_size / vision.spatial_merge_size**2
        seconds = Cost(volume / self._context_link)
        return Seconds(seconds, seconds * passes), volume * (1 + passes)

    def _latency(self, tensor: int) -> Seconds:
        """Of a layer's four collectives among its tensor ranks, forward and backward."""
        each = Cost(4e-6 * self.hardware.latency_us * (tensor > 1))
        return Seconds(each, each)

    def _head(self, trained: float) -> Seconds:
        config, work = self.config, self._work
        own = trained / (config.parallel.tensor * config.parallel.context)
        logits = own * config.model.shape.text.vocab_size
        rate, memory = _peak(config, self.hardware) * self.hardware.matmul_efficiency, _memory_rate(self.hardware)
        if layer_spec(config) == "te":
            # Written in bf16, read for their maximum and sum, read and replaced by their gradient; which is scaled in place.
            loss = (2 + 2 + 4) * logits / memory, 4 * logits / memory
        else:
            # Written in bf16, read, written in fp32, its maximum, exponential and sum; then the gradient in fp32 and in bf16.
            loss = (2 + 2 + 4 + 4 + 8 + 4) * logits / memory, (8 + 6) * logits / memory
        passes = learning(config).text
        going, back = own * work.forward_trained.head / rate, own * work.backward_trained.head / rate
        return Seconds(Cost(going + loss[0]), Cost((back + loss[1]) * passes))


@dataclass(frozen=True)
class _Work:
    """Operations on all ranks together: of one row's layers, of one trained token behind the last attention, of one patch.

    The row's are without its patches and as if all its tokens went through the last MLP.
    """

    forward: Flops
    backward: Flops
    forward_trained: Flops
    backward_trained: Flops
    forward_patch: Flops
    backward_patch: Flops


@lru_cache(maxsize=16)
def _work(model: ModelConfig, length: int, mean_tokens: float, document_tokens: float, frame_patches: float) -> _Work:
    """The work of a mean row: its padding is computed, its documents attend within themselves."""
    shape = model.shape
    document, side = max(1, round(document_tokens)), max(1, round(frame_patches / 2))

    def both(lengths: list[int], frames: list[tuple[int, int]], trained: int | None = None) -> tuple[Flops, Flops]:
        forward = forward_flops(shape, lengths, frames, trained)
        return forward, _scale(forward, -1.0) + training_flops(shape, lengths, frames, model.freeze, model.lora, trained)

    one, many = both([1], []), both([document], [])
    row = (
        Flops(text_linear=length * token.text_linear, text_attention=mean_tokens / document * several.text_attention)
        for token, several in zip(one, many, strict=True)
    )
    trained = (token + _scale(untrained, -1.0) for token, untrained in zip(one, both([1], [], 0), strict=True))
    patch = (_scale(flops, 1 / (2 * side)) for flops in both([], [(2, side)]))
    return _Work(*row, *trained, *patch)


def _scale(flops: Flops, factor: float) -> Flops:
    return Flops(*(factor * value for value in astuple(flops)))


def useful_flops(config: StageConfig, rows: RowSample) -> float:
    """Operations that one row needs on average, forward and backward, without padding: what an MFU counts."""
    shape, model = config.model.shape, config.model
    length, side = max(1, round(rows.document_tokens)), max(1, round(rows.frame_patches / 2))
    document = training_flops(shape, [length], [], model.freeze, model.lora, 0).total / length
    trained = training_flops(shape, [1], [], model.freeze, model.lora).total
    trained -= training_flops(shape, [1], [], model.freeze, model.lora, 0).total
    frame = training_flops(shape, [], [(2, side)], model.freeze, model.lora).total / (2 * side)
    return rows.mean_tokens * document + rows.mean_trained * trained + rows.mean_patches * frame


def _peak(config: StageConfig, hardware: Hardware) -> float:
    return (hardware.bf16_tflops if config.precision.dtype == "bf16" else hardware.fp32_tflops) * 1e12


def _memory_rate(hardware: Hardware) -> float:
    return hardware.memory_gbs * 1e9 * hardware.memory_efficiency


def _rate(hardware: Hardware, spanned: int) -> float:
    """Bytes a second to a neighbour among so many consecutive ranks."""
    if spanned <= hardware.gpus_per_node:
        return hardware.link_gbs * 1e9 * hardware.link_efficiency
    return hardware.network_gbs * 1e9 * hardware.network_efficiency


def data_rate(hardware: Hardware, tensor: int, sharers: int) -> float:
    """Bytes a second of a collective over the ranks that share gradients, which stand `tensor` ranks apart.

    Between nodes a ring enters a node by all the adapters of its members there.
    """
    if tensor * sharers <= hardware.gpus_per_node:
        return _rate(hardware, 1)
    members = max(1, hardware.gpus_per_node // tensor)
    network = members * hardware.network_gbs * 1e9 * hardware.network_efficiency
    return min(_rate(hardware, 1), network)


def stage_rate(hardware: Hardware, gpus: int, stages: int) -> float:
    """Bytes a second to the next pipeline stage, which stands gpus / stages ranks apart."""
    return _rate(hardware, 2 * gpus // stages if stages > 1 else 1)
