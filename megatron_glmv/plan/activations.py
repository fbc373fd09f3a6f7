"""Bytes that a forward pass keeps for its backward pass, by tower, layer spec, recomputation and layout.

The ``torch`` spec is counted tensor by tensor and held to what autograd really keeps (tests/plan/test_activations.py). The
``te`` spec keeps less: its norms keep their input and a number a token, its attention keeps query, key, value, output and a
number a head, its gated product keeps one input, its cross-entropy the logits' gradient in place of the logits. That count is
read from Transformer Engine's modules and not measured here.

Behind the decoder's last attention only trained tokens go on, so the last layer keeps less than the others, and the head keeps
and makes logits of those tokens alone.

Letters: S tokens of this context rank, s of this tensor rank under sequence parallelism (else S), K of the S tokens that go on
behind the last attention, h width, a and k channels of this rank's queries and keys, f of this rank's MLP, e bytes of an
element.

Source: model/{norm,layers,attention,text,vision,projector}.py; sequence/shard.py (`trained_indices`);
megatron-core 0.16.1, tensor_parallel/{layers,cross_entropy}.py;
Transformer Engine 2.11, pytorch/module/{layernorm_linear,linear}.py, pytorch/attention and pytorch/cross_entropy.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_glmv.config.fp8 import trained_multiple
from megatron_glmv.config.linears import adapted_layers
from megatron_glmv.config.rl import ENTROPY_BLOCK
from megatron_glmv.config.rl_stage import RlConfig
from megatron_glmv.config.training import StageConfig

Kind = Literal["te", "torch"]


@dataclass(frozen=True)
class Layer:
    """One transformer layer on one rank.

    Attributes:
        full: tokens that its products see, S.
        part: tokens between its products, s.
        keys: tokens of keys and values in attention: S, or with the torch spec those of the whole row.
        width: h.
        query: a.
        key: k.
        heads: of this rank.
        ffn: f.
        norms: 2, or 4 with norms behind the branches, too.
        rotary: bytes a token that the rotation keeps in every layer.
        element: e.
        kind: layer spec.
        fp8: whether products are in FP8, which keep their inputs in one byte.
        learns: whether its matrices do; frozen ones keep no input.
        going_on: K, tokens that its MLP and the norms around it see; None: S.
    """

    full: float
    part: float
    keys: float
    width: int
    query: int
    key: int
    heads: int
    ffn: int
    norms: int
    rotary: float
    element: int
    kind: Kind
    fp8: bool = False
    learns: bool = True
    going_on: float | None = None

    @property
    def behind(self) -> float:
        """Tokens that the MLP's products see."""
        return self.full if self.going_on is None else self.going_on

    @property
    def behind_part(self) -> float:
        """Tokens of this rank between the MLP's products."""
        return self.part if self.going_on is None else self.going_on * self.part / self.full

    def kept(self, recompute: str) -> float:
        """Bytes that stay until the backward pass under a kind of recomputation."""
        if recompute == "full":
            return self.element * self.width * self.part
        attention = self._norms(self.part) + self._attention(recompute == "selective")
        return attention + self._norms(self.behind_part) + self._mlp()

    def _input(self) -> float:
        """Bytes of one element of what a product keeps of its input."""
        return (1 if self.fp8 else self.element) * self.learns

    def _norms(self, tokens: float) -> float:
        """One branch's norms, and the input of the product behind the norm at its head."""
        if self.kind == "te" or self.element == 4:
            norm = self.element * self.width + 4
        else:
            # bf16: the input in fp32, the root, and the normed input in bf16 for the gradient of the weight.
            norm = 4 * self.width + 4 + self.element * self.width * self.learns
        return tokens * (self.norms / 2 * norm + self._input() * self.width)

    def _attention(self, recomputed: bool) -> float:
        size, query, key = self.element, self.query, self.key
        output = self._input() * query * self.full
        scores = 4 * self.heads * self.full
        if self.kind == "te":
            # The output is kept by attention itself and, in another format with FP8, by the product behind it.
            own = size * query * self.full + scores if self.fp8 and not recomputed else 0 if recomputed else scores
            return size * (query + 2 * key) * self.full + output + own
        if recomputed:
            # Values are a view of the fused product, which stays whole.
            return size * (2 * query + 3 * key) * self.full + output + self.rotary * self.full
        # Gathered by document; keys and values repeated for every query head.
        return size * query * (2 * self.full + 2 * self.keys) + output + scores + self.rotary * self.full

    def _mlp(self) -> float:
        product = self._input() * self.ffn
        if self.kind == "te":
            return self.behind * (2 * self.ffn * self.element + product)
        return self.behind * (self.ffn * self.element * 4 + product)

    def backward(self) -> float:
        """Bytes of gradients that exist at once at the widest place of its backward pass, the MLP."""
        return self.element * (3 * self.ffn * self.full + self.width * (self.full + 2 * self.part))


@dataclass(frozen=True)
class RowBytes:
    """What one row keeps on a rank.

    Attributes:
        vision: bytes of the vision tower's layers.
        merger: of what stands before and behind them: patches, embedding, position table, merger.
        text: of one decoder layer; a chunk has several.
        last: of the last decoder layer.
        entry: of what stands before the layers, on the first stage and on every other one.
        head: of final norm, logits and losses.
        working: the largest set of temporary tensors: a layer that is computed again, and gradients on their way.
        head_working: logits, and gradients of them, beside the kept ones.
    """

    vision: float
    merger: float
    text: float
    last: float
    entry: tuple[float, float]
    head: float
    working: float
    head_working: float


def layer_spec(config: StageConfig) -> Kind:
    """The layer spec that the configuration gets on a GPU with Transformer Engine."""
    return config.precision.layers_on_gpu


def row_bytes(config: StageConfig, patches: float, kind: Kind | None = None, going_on: float | None = None) -> RowBytes:
    """What one row keeps for its backward pass on one rank.

    Args:
        config: the stage.
        patches: of the row.
        kind: layer spec; None: the one that a GPU gets.
        going_on: tokens of this context rank that go on behind the last attention (`most_going_on`); None: all.
    """
    kind = kind or layer_spec(config)
    text, vision = text_layer(config, kind), vision_layer(config, patches, kind)
    last = text_layer(config, kind, going_on)
    learns = learning(config)
    recompute = config.recompute
    blocks = config.model.shape.vision.num_layers * vision.kept(recompute.vision) if learns.vision else 0.0
    merger = _merger(config, patches, kind) if learns.merger else 0.0
    own_text, own_last = (layer.kept(recompute.text) if learns.text else 0.0 for layer in (text, last))
    head, head_working = _head(config, last)
    again = max(
        text.kept("none") if recompute.text == "full" else 0.0, vision.kept("none") if recompute.vision == "full" else 0.0
    )
    working = again + max(text.backward(), vision.backward())
    entry = _entry(text, config) if learns.text else (0.0, 0.0)
    return RowBytes(blocks, merger, own_text, own_last, entry, head if learns.text else 0.0, working, head_working)


def most_going_on(config: StageConfig, trained: float) -> float:
    """The most tokens of one context rank that can go on behind the last attention for a row of which so many are trained.

    Every tensor rank takes as many as the one that has most, and which has how many is not known before a row is read: here all
    lie with one context rank and, as far as they have room, with one of its tensor ranks.
    """
    layout = config.parallel
    shares = layout.tensor if layout.sequence_parallel else 1
    unit = trained_multiple(config.precision, layout)
    return shares * min(config.sequence_length / layout.context / shares, max(1, math.ceil(trained / unit)) * unit)


@dataclass(frozen=True)
class Learning:
    """Through which parts gradients pass: those that learn, and those behind one that does."""

    vision: bool
    merger: bool
    text: bool


def learning(config: StageConfig) -> Learning:
    """Through which parts of the model gradients pass."""
    model = config.model
    if model.lora is None:
        vision = "vision" not in model.freeze
        merger = vision or "merger" not in model.freeze
        return Learning(vision, merger, merger or "text" not in model.freeze)
    adapted = adapted_layers(model.lora, model.shape).values()
    vision = any(layer.part == "vision" for layer in adapted)
    return Learning(vision, vision or any(layer.part == "merger" for layer in adapted), True)


def text_layer(config: StageConfig, kind: Kind, going_on: float | None = None) -> Layer:
    """One decoder layer of a full row; the last one where tokens of this context rank that go on behind it are given."""
    text, layout, precision = config.model.shape.text, config.parallel, config.precision
    tensor = layout.tensor
    full = config.sequence_length / layout.context
    element = 2 if precision.dtype == "bf16" else 4
    # The torch spec gathers keys of the whole row; of the documents' later halves a rank sees one piece less or more.
    keys = config.sequence_length * (1 + 1 / (2 * layout.context)) if layout.context > 1 and kind == "torch" else full
    rotary = 2 * text.rotary_dim * element if element == 2 else 0
    return Layer(
        full=full,
        part=full / tensor if layout.sequence_parallel else full,
        keys=keys,
        width=text.hidden_size,
        query=text.num_heads * text.head_dim // tensor,
        key=max(1, text.num_kv_heads // tensor) * text.head_dim,
        heads=text.num_heads // tensor,
        ffn=text.ffn_hidden_size // tensor,
        norms=4,
        rotary=rotary,
        element=element,
        kind=kind,
        fp8=precision.fp8_text != "off",
        learns=config.model.lora is None and "text" not in config.model.freeze,
        going_on=going_on,
    )


def own_patches(config: StageConfig, patches: float) -> float:
    """Patches of a row that one rank of the first stage encodes: all of them, or its share where frames are dealt."""
    layout = config.parallel
    return patches / (layout.tensor * layout.context) if layout.vision == "images" else patches


def vision_layer(config: StageConfig, patches: float, kind: Kind) -> Layer:
    """One layer of the vision tower.

    Args:
        config: the stage.
        patches: of the row. Tensor ranks share its patches and context ranks each compute all of them, or, with
            parallel.vision=images, each of these ranks computes its own frames.
        kind: layer spec.
    """
    vision, layout, precision = config.model.shape.vision, config.parallel, config.precision
    tensor, own = layout.vision_tensor, own_patches(config, patches)
    channels = vision.hidden_size // tensor
    return Layer(
        full=own,
        part=own / tensor if layout.sequence_parallel else own,
        keys=own,
        width=vision.hidden_size,
        query=channels,
        key=channels,
        heads=vision.num_heads // tensor,
        ffn=vision.ffn_hidden_size // tensor,
        norms=2,
        rotary=0.0,
        element=2 if precision.dtype == "bf16" else 4,
        kind=kind,
        fp8=precision.fp8_vision != "off",
        learns=config.model.lora is None and "vision" not in config.model.freeze,
    )


def _entry(text: Layer, config: StageConfig) -> tuple[float, float]:
    """Kept once a row, on the first stage and on every other one."""
    shares_angles = text.element == 4 or config.recompute.text == "full"
    angles = 4 * config.model.shape.text.rotary_dim * text.full if shares_angles else 0.0
    # The first layer's input is a view of the embeddings of all tensor ranks' tokens.
    return angles + text.element * text.width * (text.full - text.part), angles


def _norm(element: int, width: int, kind: Kind) -> float:
    """Bytes a token of one norm of a part that learns."""
    return element * width + 4 if kind == "te" or element == 4 else (4 + element) * width + 4


def _merger(config: StageConfig, patches: float, kind: Kind) -> float:
    """Everything of the vision stage but its layers."""
    shape, layout = config.model.shape, config.parallel
    vision, element = shape.vision, 2 if config.precision.dtype == "bf16" else 4
    share = layout.vision_tensor if layout.sequence_parallel else 1
    features = element * vision.out_hidden_size * patches / vision.spatial_merge_size**2 / layout.context
    patches = own_patches(config, patches)
    merged = patches / vision.spatial_merge_size**2
    width, out, ffn = vision.hidden_size, vision.out_hidden_size, vision.merger_ffn_hidden_size // layout.vision_tensor
    # Norm behind the embedding is ours in both specs; the one behind the layers is the spec's.
    entry = element * vision.patch_dim + _norm(element, width, "torch") + 4 * vision.position_grid**2
    leaving = _norm(element, width, kind)
    rotary = 4 * vision.head_dim * patches
    own = learning(config)
    tower = (entry + leaving) * patches / share + rotary if own.vision else 0.0
    gelu = element * (vision.spatial_merge_size**2 * width + 4 * out) + 2 * element
    return tower + gelu * merged / share + element * (5 if kind == "torch" else 3) * ffn * merged + features


def _head(config: StageConfig, last: Layer) -> tuple[float, float]:
    """Kept by final norm, output layer and loss of what leaves the last layer; and temporary logits."""
    logits = last.behind * config.model.shape.text.vocab_size / config.parallel.tensor
    kept = last.behind_part * (_norm(last.element, last.width, last.kind) + last.element * last.width)
    if last.kind == "te":
        # Its cross-entropy writes their gradient over them.
        return kept + last.element * logits, _entropies(config, last.behind)
    return kept + 4 * logits, 2 * logits if last.element == 2 else 0.0


def _entropies(config: StageConfig, tokens: float) -> float:
    """Temporary distributions of the tokens whose entropy is reported at a time, in three forms."""
    if not isinstance(config, RlConfig):
        return 0.0
    return 3 * 4 * min(tokens, ENTROPY_BLOCK) * config.model.shape.text.vocab_size / config.parallel.tensor
