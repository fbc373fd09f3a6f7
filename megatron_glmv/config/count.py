"""Exact parameter counts from the model's numbers alone, so that ``glmv check`` needs no torch.

Source: the modules of transformers 5.23.0, models/glm4v/modeling_glm4v.py; the released 9B counts 10,292,777,472.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_glmv.config.model import ModelShape, TextShape, VisionShape


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of each part of the model.

    Attributes:
        vision: patch embedding, position table and blocks of the vision tower.
        merger: 2 x 2 downsample and gated merger.
        text: token embedding, decoder layers and final norm.
        head: the output layer.
    """

    vision: int
    merger: int
    text: int
    head: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.vision + self.merger + self.text + self.head


def count_parameters(shape: ModelShape) -> ParameterCount:
    """Parameters of the whole model, without the padding of a layout."""
    text = shape.text
    return ParameterCount(
        vision=_vision(shape.vision),
        merger=_merger(shape.vision),
        text=text.vocab_size * text.hidden_size + text.num_layers * _text_layer(text) + text.hidden_size,
        head=text.vocab_size * text.hidden_size,
    )


def _text_layer(text: TextShape) -> int:
    query, key_value = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    qkv = (text.hidden_size + 1) * (query + 2 * key_value)
    output = query * text.hidden_size
    norms = 4 * text.hidden_size
    return qkv + output + 3 * text.hidden_size * text.ffn_hidden_size + norms


def _vision(vision: VisionShape) -> int:
    width = vision.hidden_size
    patches = (vision.patch_dim + 1) * width + vision.position_grid**2 * width
    block = 4 * width**2 + 3 * width * vision.ffn_hidden_size + 2 * width
    return patches + vision.num_layers * block + 2 * width


def _merger(vision: VisionShape) -> int:
    width, merge = vision.out_hidden_size, vision.spatial_merge_size
    downsample = (vision.hidden_size * merge**2 + 1) * width
    return downsample + width**2 + 2 * width + 3 * width * vision.merger_ffn_hidden_size
