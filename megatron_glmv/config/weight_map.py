"""The weight map between Hugging Face and Megatron as one table: names, shapes, order of rows, and how tensor ranks share them.

Every Megatron tensor is a list of row segments of one or more Hugging Face tensors (tensors of more than two axes are first
flattened to two). Everything follows from the `ModelShape` alone, without torch: what converts weights (convert/mapping.py) and
what counts them (plan/weights.py) read the same table.

Source: transformers 5.23.0, models/glm4v/modeling_glm4v.py (names, shapes); megatron-core 0.16.1, transformer/attention.py
(`get_query_key_value_tensors`: query, key, value rows per key/value head) and transformer/mlp.py (gate rows, then up rows).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megatron_glmv.config.base import InputError
from megatron_glmv.config.model import ModelShape

Order = Literal["same", "stack", "text_qkv", "vision_qkv"]
"""How a Megatron tensor lines up Hugging Face rows: as they are; one tensor after the other; queries, key and value of each
key/value head together, from three tensors; the same for every head, from one tensor [all queries; all keys; all values]."""
Split = Literal["whole", "rows", "gated_rows", "columns"]
"""How tensor ranks share a Megatron tensor: all hold all of it; equal chunks of rows; a chunk of the gate rows followed by the
same chunk of the up rows; equal chunks of columns."""


class MappingError(InputError):
    """Weights that do not fit the table; the message names the tensor."""


@dataclass(frozen=True)
class Rule:
    """One line of the table; `{n}` in names stands for the layer's number.

    Attributes:
        megatron: the full (unsharded) parameter's name.
        hf: Hugging Face name -> its axes, letters of `axis_sizes`.
        order: how the rows are lined up.
        split: how tensor ranks share the result.
    """

    megatron: str
    hf: Mapping[str, str]
    order: Order
    split: Split


def _rules(megatron: str, hf: str, *lines: tuple[str, Order, Split, dict[str, str]]) -> tuple[Rule, ...]:
    """Rules whose names share the prefixes `megatron` and `hf`."""
    return tuple(
        Rule(megatron + name, {hf + source: axes for source, axes in sources.items()}, order, split)
        for name, order, split, sources in lines
    )


RULES: tuple[Rule, ...] = (
    *_rules(
        "vision_model.",
        "model.visual.",
        ("patch_embed.weight", "same", "whole", {"patch_embed.proj.weight": "D c t p p"}),
        ("patch_embed.bias", "same", "whole", {"patch_embed.proj.bias": "D"}),
        ("post_conv_layernorm.weight", "same", "whole", {"post_conv_layernorm.weight": "D"}),
        ("position_embedding.weight", "same", "whole", {"embeddings.position_embedding.weight": "G D"}),
        ("decoder.final_layernorm.weight", "same", "whole", {"post_layernorm.weight": "D"}),
    ),
    *_rules(
        "vision_model.decoder.layers.{n}.",
        "model.visual.blocks.{n}.",
        ("self_attention.linear_qkv.layer_norm_weight", "same", "whole", {"norm1.weight": "D"}),
        ("self_attention.linear_qkv.weight", "vision_qkv", "rows", {"attn.qkv.weight": "3D D"}),
        ("self_attention.linear_proj.weight", "same", "columns", {"attn.proj.weight": "D D"}),
        ("mlp.linear_fc1.layer_norm_weight", "same", "whole", {"norm2.weight": "D"}),
        ("mlp.linear_fc1.weight", "stack", "gated_rows", {"mlp.gate_proj.weight": "I D", "mlp.up_proj.weight": "I D"}),
        ("mlp.linear_fc2.weight", "same", "columns", {"mlp.down_proj.weight": "D I"}),
    ),
    *_rules(
        "vision_projection.",
        "model.visual.",
        ("downsample.weight", "same", "whole", {"downsample.weight": "O D m m"}),
        ("downsample.bias", "same", "whole", {"downsample.bias": "O"}),
        ("proj.weight", "same", "whole", {"merger.proj.weight": "O O"}),
        ("norm.weight", "same", "whole", {"merger.post_projection_norm.weight": "O"}),
        ("norm.bias", "same", "whole", {"merger.post_projection_norm.bias": "O"}),
        ("mlp.linear_fc1.weight", "stack", "gated_rows", {"merger.gate_proj.weight": "M O", "merger.up_proj.weight": "M O"}),
        ("mlp.linear_fc2.weight", "same", "columns", {"merger.down_proj.weight": "O M"}),
    ),
    *_rules(
        "language_model.",
        "model.language_model.",
        ("embedding.word_embeddings.weight", "same", "rows", {"embed_tokens.weight": "V H"}),
        ("decoder.final_layernorm.weight", "same", "whole", {"norm.weight": "H"}),
    ),
    *_rules(
        "language_model.decoder.layers.{n}.",
        "model.language_model.layers.{n}.",
        ("self_attention.linear_qkv.layer_norm_weight", "same", "whole", {"input_layernorm.weight": "H"}),
        (
            "self_attention.linear_qkv.weight",
            "text_qkv",
            "rows",
            {"self_attn.q_proj.weight": "Q H", "self_attn.k_proj.weight": "K H", "self_attn.v_proj.weight": "K H"},
        ),
        (
            "self_attention.linear_qkv.bias",
            "text_qkv",
            "rows",
            {"self_attn.q_proj.bias": "Q", "self_attn.k_proj.bias": "K", "self_attn.v_proj.bias": "K"},
        ),
        ("self_attention.linear_proj.weight", "same", "columns", {"self_attn.o_proj.weight": "H Q"}),
        ("post_self_attn_layernorm.weight", "same", "whole", {"post_self_attn_layernorm.weight": "H"}),
        ("mlp.linear_fc1.layer_norm_weight", "same", "whole", {"post_attention_layernorm.weight": "H"}),
        ("mlp.linear_fc1.weight", "same", "gated_rows", {"mlp.gate_up_proj.weight": "2F H"}),
        ("mlp.linear_fc2.weight", "same", "columns", {"mlp.down_proj.weight": "H F"}),
        ("post_mlp_layernorm.weight", "same", "whole", {"post_mlp_layernorm.weight": "H"}),
    ),
    Rule("language_model.output_layer.weight", {"lm_head.weight": "V H"}, "same", "rows"),
)


def axis_sizes(shape: ModelShape) -> dict[str, int]:
    """What the letters of the table's axes stand for: capitals are widths, small letters the patch convolutions' axes."""
    text, vision = shape.text, shape.vision
    return {
        "V": text.vocab_size,
        "H": text.hidden_size,
        "Q": text.num_heads * text.head_dim,
        "K": text.num_kv_heads * text.head_dim,
        "F": text.ffn_hidden_size,
        "2F": 2 * text.ffn_hidden_size,
        "D": vision.hidden_size,
        "3D": 3 * vision.hidden_size,
        "I": vision.ffn_hidden_size,
        "O": vision.out_hidden_size,
        "M": vision.merger_ffn_hidden_size,
        "G": vision.position_grid**2,
        "c": vision.in_channels,
        "t": vision.temporal_patch_size,
        "p": vision.patch_size,
        "m": vision.spatial_merge_size,
    }


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `stop` of the Hugging Face tensor number `source` of a rule."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class Entry:
    """A rule applied to one layer of one `ModelShape`.

    Attributes:
        name: the Megatron parameter, full layer number.
        hf_names: the Hugging Face tensors it is made of.
        hf_shapes: their shapes.
        shape: the unsharded Megatron shape, one or two axes.
        segments: the Hugging Face rows in Megatron's order; they cover every row of every source once.
        split: how tensor ranks share it.
    """

    name: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]
    split: Split


@lru_cache(maxsize=16)
def entries(shape: ModelShape) -> dict[str, Entry]:
    """The whole map of one architecture: Megatron name -> entry, in the order of the table."""
    sizes = axis_sizes(shape)
    found: dict[str, Entry] = {}
    for rule in RULES:
        num_layers = shape.vision.num_layers if rule.megatron.startswith("vision_model.") else shape.text.num_layers
        for layer in range(num_layers if "{n}" in rule.megatron else 1):
            hf_shapes = tuple(tuple(sizes[axis] for axis in axes.split()) for axes in rule.hf.values())
            rows, columns = sum(s[0] for s in hf_shapes), hf_shapes[0][1:]
            name = rule.megatron.replace("{n}", str(layer))
            found[name] = Entry(
                name=name,
                hf_names=tuple(source.replace("{n}", str(layer)) for source in rule.hf),
                hf_shapes=hf_shapes,
                shape=(rows, math.prod(columns)) if columns else (rows,),
                segments=_segments(rule.order, [s[0] for s in hf_shapes], shape),
                split=rule.split,
            )
    return found


def _segments(order: Order, rows: Sequence[int], shape: ModelShape) -> tuple[Segment, ...]:
    if order in ("same", "stack"):
        return tuple(Segment(source, 0, count) for source, count in enumerate(rows))
    if order == "vision_qkv":
        width, heads = shape.vision.head_dim, shape.vision.num_heads
        starts = [(0, (part * heads + head) * width, width) for head in range(heads) for part in range(3)]
    else:
        width, heads = shape.text.head_dim, shape.text.num_kv_heads
        queries = shape.text.num_heads // heads * width
        starts = [(source, head * n, n) for head in range(heads) for source, n in enumerate((queries, width, width))]
    return tuple(Segment(source, start, start + count) for source, start, count in starts)


def entry(name: str, shape: ModelShape) -> Entry:
    """The entry of one Megatron parameter.

    Raises:
        MappingError: no rule covers the name.
    """
    try:
        return entries(shape)[name]
    except KeyError:
        raise MappingError(f"no rule of config/weight_map.py covers the Megatron parameter {name}") from None


def megatron_names(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every Megatron parameter of the architecture with its unsharded shape."""
    return {name: found.shape for name, found in entries(shape).items()}


def hf_names(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the architecture with its shape, in the order in which export writes them."""
    return {name: size for found in entries(shape).values() for name, size in zip(found.hf_names, found.hf_shapes, strict=True)}


def check_names(found: Iterable[str], expected: Iterable[str], where: str) -> None:
    """Refuse a set of tensors that is not exactly the expected one.

    Args:
        found: the names that are there.
        expected: the names that the table gives.
        where: the origin, for the message.

    Raises:
        MappingError: names that no rule covers, or names that a rule needs and that are missing.
    """
    there, needed = set(found), set(expected)
    if unknown := sorted(there - needed):
        raise MappingError(f"{where}: no rule of config/weight_map.py covers {_listing(unknown)}")
    if missing := sorted(needed - there):
        raise MappingError(f"{where}: missing {_listing(missing)}")


def check_hf_shapes(found: Mapping[str, tuple[int, ...]], shape: ModelShape, where: str) -> None:
    """Refuse Hugging Face tensors that are not exactly those of an architecture.

    Args:
        found: name -> shape of the tensors that are there.
        shape: the architecture.
        where: the origin, for the message.

    Raises:
        MappingError: a tensor that no rule covers, one that is missing, or one of another shape.
    """
    expected = hf_names(shape)
    check_names(found, expected, where)
    for name, size in expected.items():
        if found[name] != size:
            raise MappingError(f"{where}: {name} has shape {list(found[name])}, the configuration says {list(size)}")


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def split_of(name: str) -> Split:
    """How tensor ranks share a Megatron parameter.

    Raises:
        MappingError: no rule covers the name.
    """
    pattern = re.sub(r"(?<=\.layers\.)\d+(?=\.)", "{n}", name)
    if pattern not in _SPLITS:
        raise MappingError(f"no rule of config/weight_map.py covers the Megatron parameter {name}")
    return _SPLITS[pattern]


_SPLITS: dict[str, Split] = {rule.megatron: rule.split for rule in RULES}


@dataclass(frozen=True)
class RankPart:
    """What one tensor rank holds of an unsharded tensor: row ranges one after the other, and a column range (None: all)."""

    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int] | None = None


def part_of_rank(name: str, full_shape: Sequence[int], tensor_rank: int, tensor_size: int) -> RankPart:
    """Rows and columns of an unsharded tensor that belong to one tensor rank.

    Raises:
        MappingError: no rule covers `name`, or the tensor cannot be divided.
    """
    split, rows = split_of(name), full_shape[0]
    axis = full_shape[1] if split == "columns" else rows // 2 if split == "gated_rows" else rows
    if split != "whole" and axis % tensor_size:
        raise MappingError(f"{name}: {axis} {split.replace('_', ' ')} cannot be divided over {tensor_size} tensor ranks")
    start, stop = tensor_rank * axis // tensor_size, (tensor_rank + 1) * axis // tensor_size
    if split == "rows":
        return RankPart(((start, stop),))
    if split == "gated_rows":
        return RankPart(((start, stop), (axis + start, axis + stop)))
    return RankPart(((0, rows),), (start, stop) if split == "columns" else None)


def rank_segments(found: Entry, part: RankPart) -> list[Segment]:
    """The Hugging Face rows that make up one rank's rows, in order, so that a rank reads nothing else."""
    wanted: list[Segment] = []
    for first, last in part.rows:
        row = 0
        for s in found.segments:
            low, high = max(first, row), min(last, row + s.stop - s.start)
            if low < high:
                wanted.append(Segment(s.source, s.start + low - row, s.start + high - row))
            row += s.stop - s.start
    return wanted
