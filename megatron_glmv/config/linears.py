"""The model's linear layers by their Hugging Face names, and which of them get an adapter.

The names are Hugging Face's because an adapter's user knows the layers by them, and because an exported adapter must name them.

Source: transformers 5.23.0, models/glm4v/modeling_glm4v.py; held to the weight map by
tests/convert/test_peft_export.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from megatron_glmv.config.base import ConfigError
from megatron_glmv.config.lora import LoraConfig
from megatron_glmv.config.model import ModelShape, Part

NOT_LINEAR = {
    "model.visual.patch_embed.proj": "a convolution",
    "model.visual.downsample": "a convolution",
    "model.visual.embeddings.position_embedding": "an embedding",
    "model.language_model.embed_tokens": "an embedding",
}
"""Layers with a matrix that cannot have an adapter."""


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer: the part of the model it belongs to, and its widths."""

    part: Part
    inputs: int
    outputs: int


@lru_cache(maxsize=16)
def linear_layers(shape: ModelShape) -> dict[str, LinearLayer]:
    """Every linear layer by its Hugging Face module name, in the order in which the model computes them."""
    text, vision = shape.text, shape.vision
    width, ffn, merged, merger_ffn = (
        vision.hidden_size,
        vision.ffn_hidden_size,
        vision.out_hidden_size,
        vision.merger_ffn_hidden_size,
    )
    block = {
        "attn.qkv": (width, 3 * width),
        "attn.proj": (width, width),
        "mlp.gate_proj": (width, ffn),
        "mlp.up_proj": (width, ffn),
        "mlp.down_proj": (ffn, width),
    }
    merger = {
        "proj": (merged, merged),
        "gate_proj": (merged, merger_ffn),
        "up_proj": (merged, merger_ffn),
        "down_proj": (merger_ffn, merged),
    }
    query, key_value = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    layer = {
        "self_attn.q_proj": (text.hidden_size, query),
        "self_attn.k_proj": (text.hidden_size, key_value),
        "self_attn.v_proj": (text.hidden_size, key_value),
        "self_attn.o_proj": (query, text.hidden_size),
        "mlp.gate_up_proj": (text.hidden_size, 2 * text.ffn_hidden_size),
        "mlp.down_proj": (text.ffn_hidden_size, text.hidden_size),
    }
    found = {
        f"model.visual.blocks.{number}.{name}": LinearLayer("vision", *widths)
        for number in range(vision.num_layers)
        for name, widths in block.items()
    }
    found |= {f"model.visual.merger.{name}": LinearLayer("merger", *widths) for name, widths in merger.items()}
    found |= {
        f"model.language_model.layers.{number}.{name}": LinearLayer("text", *widths)
        for number in range(text.num_layers)
        for name, widths in layer.items()
    }
    return found | {"lm_head": LinearLayer("text", text.hidden_size, text.vocab_size)}


@lru_cache(maxsize=16)
def adapted_layers(lora: LoraConfig, shape: ModelShape) -> dict[str, LinearLayer]:
    """The linear layers that get an adapter, by their Hugging Face module names, in the order of `linear_layers`.

    Raises:
        ConfigError: a pattern that matches no linear layer.
    """
    layers = linear_layers(shape)
    chosen: set[str] = set()
    for pattern in lora.targets:
        if not (matched := {name for name in layers if _matches(name, pattern)}):
            other = next((f"{name}, which is {kind}" for name, kind in NOT_LINEAR.items() if _matches(name, pattern)), None)
            where = f"matches {other}; only linear layers can have adapters" if other else "matches no linear layer"
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ConfigError(f"model.lora.targets: {pattern!r} {where}: {ends}")
        chosen |= matched
    return {name: layer for name, layer in layers.items() if name in chosen}


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def count_adapters(lora: LoraConfig, shape: ModelShape) -> dict[Part, int]:
    """Parameters of the adapters in each part of the model; the head counts as text.

    Raises:
        ConfigError: as `adapted_layers`.
    """
    count: dict[Part, int] = {"vision": 0, "merger": 0, "text": 0}
    for layer in adapted_layers(lora, shape).values():
        count[layer.part] += lora.rank * (layer.inputs + layer.outputs)
    return count
