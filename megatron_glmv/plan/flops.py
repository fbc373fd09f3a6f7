"""Floating-point operations of GLM-4.1V by part, from document lengths, trained tokens and frame sizes.

An MFU is as good as this count. Formulas made for other models miss three things here: the vision tower's MLP is gated and
as wide as `out_hidden_size` (the large `intermediate_size` belongs to the merger, which runs on a quarter of the tokens), its
attention is quadratic in one frame and not in the row, and the decoder's attention is causal within one document. And behind
the last attention no token reads another, so the last decoder layer's MLP and the head compute trained tokens only.

Counted: matrix products and attention, a multiply-add as two, of the tokens and patches that carry content. Not counted:
padding, recomputed activations, norms, rotary, softmax, the position table.

Source: the modules of transformers 5.23.0, models/glm4v/modeling_glm4v.py; model/layers.py (`LastLayer`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from megatron_glmv.config.linears import adapted_layers, linear_layers
from megatron_glmv.config.lora import LoraConfig
from megatron_glmv.config.model import ModelShape, Part, TextShape, VisionShape

if TYPE_CHECKING:
    from megatron_glmv.sequence.packed import PackedSequence


@dataclass(frozen=True)
class Flops:
    """Operations of each part of the model.

    Attributes:
        vision_linear: patch embedding and the blocks' projections and MLPs.
        vision_attention: scores and sums over values, within frames.
        merger: downsample, projection and gated MLP.
        text_linear: the decoder layers' projections and MLPs; the last MLP, of trained tokens.
        text_attention: scores and sums over values, causal, within documents.
        head: the output layer, of trained tokens.
    """

    vision_linear: float = 0.0
    vision_attention: float = 0.0
    merger: float = 0.0
    text_linear: float = 0.0
    text_attention: float = 0.0
    head: float = 0.0

    @property
    def vision(self) -> float:
        """The vision tower."""
        return self.vision_linear + self.vision_attention

    @property
    def text(self) -> float:
        """The decoder's layers."""
        return self.text_linear + self.text_attention

    @property
    def total(self) -> float:
        """The whole model."""
        return sum(astuple(self))

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


def forward_flops(
    shape: ModelShape, document_lengths: Sequence[int], frames: Iterable[tuple[int, int]], trained: int | None = None
) -> Flops:
    """Operations of one forward pass.

    Args:
        shape: the model's numbers.
        document_lengths: tokens of each document, visual ones included, padding left out.
        frames: (rows, columns) in unmerged patches of each image, or of each temporal patch of a video.
        trained: tokens of all documents that go on behind the last attention; None: all.
    """
    entry, blocks, attention = _vision(shape.vision, [rows * columns for rows, columns in frames])
    downsample, merger = _merger(shape.vision, sum(rows * columns for rows, columns in frames))
    return Flops(entry + blocks, attention, downsample + merger, *_text(shape.text, document_lengths, trained))


def training_flops(
    shape: ModelShape,
    document_lengths: Sequence[int],
    frames: Iterable[tuple[int, int]],
    freeze: Collection[Part] = (),
    lora: LoraConfig | None = None,
    trained: int | None = None,
) -> Flops:
    """Operations of one forward and backward pass.

    A product costs as much again for the gradient of its input and for that of its weight. The first needs something that
    learns before it, the second that the part itself learns; so three times the forward pass where everything learns, but
    twice in the patch embedding (pixels have no gradient), and once in a vision tower that is frozen.

    Args:
        shape: the model's numbers.
        document_lengths: tokens of each document, visual ones included, padding left out.
        frames: (rows, columns) in unmerged patches of each image, or of each temporal patch of a video.
        freeze: parts that do not learn; text includes the embedding and the head.
        lora: adapters, which alone learn where they are given.
        trained: tokens of all documents that go on behind the last attention; None: all.
    """
    frames = list(frames)
    if lora is not None:
        return _lora_flops(shape, document_lengths, frames, lora, trained)
    entry, blocks, attention = _vision(shape.vision, [rows * columns for rows, columns in frames])
    downsample, merger = _merger(shape.vision, sum(rows * columns for rows, columns in frames))
    text_linear, text_attention, head = _text(shape.text, document_lengths, trained)
    vision, projector, text = ("vision" not in freeze, "merger" not in freeze, "text" not in freeze)
    anything = vision or projector or text
    return Flops(
        vision_linear=entry * (1 + vision) + blocks * (1 + 2 * vision),
        vision_attention=attention * (1 + 2 * vision),
        merger=downsample * (1 + vision + projector) + merger * (1 + (vision or projector) + projector),
        text_linear=text_linear * (1 + anything + text),
        text_attention=text_attention * (1 + 2 * anything),
        head=head * (1 + anything + text),
    )


def row_flops(shape: ModelShape, row: PackedSequence, freeze: Collection[Part] = (), lora: LoraConfig | None = None) -> Flops:
    """Operations of training on one packed row, on the tokens whose loss has a weight; its padding does not count."""
    lengths = [end - start for _, start, end in row.documents]
    frames = [(int(rows), int(columns)) for rows, columns in row.frames.tolist()]
    return training_flops(shape, lengths, frames, freeze, lora, row.num_trained)


class _Walk:
    """Goes through a model with adapters in its order and counts, for a gradient passes only behind the first adapter.

    Attention is counted whole as soon as one of query, key and value has a gradient.
    """

    def __init__(self, shape: ModelShape, lora: LoraConfig) -> None:
        self.layers, self.adapted, self.rank = linear_layers(shape), adapted_layers(lora, shape), lora.rank
        self.passes = False

    def linear(self, tokens: int, *names: str) -> float:
        """Linear layers of one input: W x, its input's gradient, and the same and both factors' gradients of the adapters."""
        total, adapted = 0.0, [name for name in names if name in self.adapted]
        for layer in (self.layers[name] for name in names):
            total += 2 * tokens * layer.inputs * layer.outputs * (1 + self.passes)
        for layer in (self.layers[name] for name in adapted):
            total += 2 * tokens * self.rank * (layer.inputs * (2 + self.passes) + layer.outputs * 3)
        self.passes = self.passes or bool(adapted)
        return total


def _lora_flops(
    shape: ModelShape,
    document_lengths: Sequence[int],
    frames: Sequence[tuple[int, int]],
    lora: LoraConfig,
    trained: int | None,
) -> Flops:
    """Operations of one forward and backward pass in which only adapters learn."""
    walk = _Walk(shape, lora)
    patches = sum(rows * columns for rows, columns in frames)
    entry, _, attention = _vision(shape.vision, [rows * columns for rows, columns in frames])
    vision_linear, vision_attention, depth = entry, 0.0, shape.vision.num_layers
    for name in (f"model.visual.blocks.{number}" for number in range(depth)):
        vision_linear += walk.linear(patches, f"{name}.attn.qkv")
        vision_attention += attention / depth * (1 + 2 * walk.passes)
        vision_linear += walk.linear(patches, f"{name}.attn.proj")
        vision_linear += walk.linear(patches, f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj")
        vision_linear += walk.linear(patches, f"{name}.mlp.down_proj")
    merged, name = patches // shape.vision.spatial_merge_size**2, "model.visual.merger"
    merger = _merger(shape.vision, patches)[0] * (1 + walk.passes)
    for layers in ([f"{name}.proj"], [f"{name}.gate_proj", f"{name}.up_proj"], [f"{name}.down_proj"]):
        merger += walk.linear(merged, *layers)
    tokens, attention = sum(document_lengths), _text(shape.text, document_lengths, trained)[1]
    trained = tokens if trained is None else trained
    text_linear, text_attention, depth = 0.0, 0.0, shape.text.num_layers
    for number in range(depth):
        name, seen = f"model.language_model.layers.{number}", tokens if number < depth - 1 else trained
        text_linear += walk.linear(tokens, *(f"{name}.self_attn.{part}_proj" for part in "qkv"))
        text_attention += attention / depth * (1 + 2 * walk.passes)
        text_linear += walk.linear(tokens, f"{name}.self_attn.o_proj")
        text_linear += walk.linear(seen, f"{name}.mlp.gate_up_proj")
        text_linear += walk.linear(seen, f"{name}.mlp.down_proj")
    return Flops(vision_linear, vision_attention, merger, text_linear, text_attention, walk.linear(trained, "lm_head"))


def _vision(vision: VisionShape, patches_of_frames: Sequence[int]) -> tuple[float, float, float]:
    """Patch embedding, the blocks' matrices, attention."""
    patches, width = sum(patches_of_frames), vision.hidden_size
    entry = 2 * patches * vision.patch_dim * width
    blocks = 2 * patches * (4 * width**2 + 3 * width * vision.ffn_hidden_size) * vision.num_layers
    attention = 4 * width * sum(patches**2 for patches in patches_of_frames) * vision.num_layers
    return entry, blocks, attention


def _merger(vision: VisionShape, patches: int) -> tuple[float, float]:
    """Downsample, and projection with the gated MLP."""
    merged, width = patches // vision.spatial_merge_size**2, vision.out_hidden_size
    downsample = 2 * merged * vision.hidden_size * vision.spatial_merge_size**2 * width
    return downsample, 2 * merged * (width**2 + 3 * width * vision.merger_ffn_hidden_size)


def _text(text: TextShape, document_lengths: Sequence[int], trained: int | None) -> tuple[float, float, float]:
    """The layers' matrices, causal attention, the head."""
    tokens, width = sum(document_lengths), text.hidden_size
    query, key_value = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    attention, mlp = width * (query + 2 * key_value) + query * width, 3 * width * text.ffn_hidden_size
    pairs = sum(length * (length + 1) // 2 for length in document_lengths)
    last = tokens if trained is None else trained
    linear = 2 * (tokens * (attention * text.num_layers + mlp * (text.num_layers - 1)) + last * mlp)
    return linear, 4 * query * pairs * text.num_layers, 2 * last * width * text.vocab_size
