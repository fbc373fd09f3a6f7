"""Two layer specs with equal parameter names: ``te`` (Transformer Engine) and ``torch`` (plain torch, any device).

The ``te`` spec fuses norm and product, rotates in one kernel, runs all segments of a row in one variable-length attention, and
computes in FP8 where the configuration says so. The ``torch`` spec computes the same function with SDPA per segment length.

Source: megatron-core 0.16.1, extensions/transformer_engine.py; Transformer Engine 2.11, pytorch/attention (thd layout: masks of
the padding kinds, cumulative lengths of whole rows also under context parallelism, whose chunks are cut as sequence/shard.py
cuts them) and common/fused_rope/fused_rope.cu (an angle for every channel, computed in fp32).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, vocab_parallel_cross_entropy
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_glmv.model.attention import RotarySelfAttention, SegmentAttention
from megatron_glmv.model.layers import (
    LastLayer,
    NormColumnParallelLinear,
    SandwichLayer,
    SandwichLayerSubmodules,
    add_residual,
)
from megatron_glmv.model.norm import RMSNorm
from megatron_glmv.model.position import angles_of_halves, angles_of_pairs, cos_sin_of, rotate_halves, rotate_pairs
from megatron_glmv.parallel.mcore import HAVE_TE

if HAVE_TE:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
        fused_apply_rotary_pos_emb,
        te_parallel_cross_entropy,
    )


@dataclass(frozen=True)
class Rotation:
    """How one kind of spec rotates queries and keys.

    Attributes:
        prepare: [S, f] float32 angles to what `rotate` takes, once a row.
        rotate: ([S, 1, heads, head_dim], what was prepared) to the same shape, in every layer.
    """

    prepare: Callable[[Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor], Tensor]


def text_rotation(kind: str) -> Rotation:
    """The decoder's: channels (2i, 2i+1) of the rotated part."""
    if kind == "te":
        return Rotation(angles_of_pairs, partial(fused_apply_rotary_pos_emb, interleaved=True))
    return Rotation(cos_sin_of, rotate_pairs)


def vision_rotation(kind: str) -> Rotation:
    """The ViT's: channels (i, i + head_dim / 2)."""
    return Rotation(angles_of_halves, fused_apply_rotary_pos_emb) if kind == "te" else Rotation(cos_sin_of, rotate_halves)


class Parts:
    """The building blocks of one kind of spec."""

    def __init__(self, kind: str) -> None:
        te = kind == "te"
        self.norm: Any = TENorm if te else RMSNorm
        self.norm_column: Any = TELayerNormColumnParallelLinear if te else NormColumnParallelLinear
        self.row: Any = TERowParallelLinear if te else RowParallelLinear
        self.core_attention: Any = TEDotProductAttention if te else SegmentAttention
        # Packed rows ask Transformer Engine for the padding kinds of mask, whether or not there is padding.
        self.causal = AttnMaskType.padding_causal if te else AttnMaskType.causal
        self.full = AttnMaskType.padding if te else AttnMaskType.no_mask

    def attention(self, mask: AttnMaskType, rotate: Any) -> ModuleSpec:
        """Self-attention with the norm before it."""
        return ModuleSpec(
            module=RotarySelfAttention,
            params={"attn_mask_type": mask, "rotate": rotate},
            submodules=SelfAttentionSubmodules(
                linear_qkv=self.norm_column, core_attention=self.core_attention, linear_proj=self.row
            ),
        )

    def mlp(self) -> ModuleSpec:
        """A gated MLP with the norm before it."""
        return ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=self.norm_column, linear_fc2=self.row))


def text_layer(kind: str, *, last: bool = False) -> ModuleSpec:
    """One decoder layer, or the model's last: causal attention by document, norms around both branches."""
    parts = Parts(kind)
    return ModuleSpec(
        module=LastLayer if last else SandwichLayer,
        submodules=SandwichLayerSubmodules(
            self_attention=parts.attention(parts.causal, text_rotation(kind).rotate),
            self_attn_bda=add_residual,
            mlp=parts.mlp(),
            mlp_bda=add_residual,
            post_self_attn_layernorm=parts.norm,
            post_mlp_layernorm=parts.norm,
        ),
    )


def vision_layer(kind: str) -> ModuleSpec:
    """One ViT layer: full attention by frame, norms before both branches."""
    parts = Parts(kind)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=parts.attention(parts.full, vision_rotation(kind).rotate),
            self_attn_bda=add_residual,
            mlp=parts.mlp(),
            mlp_bda=add_residual,
        ),
    )


def block(layers: list[ModuleSpec], kind: str) -> TransformerBlockSubmodules:
    """A stack of layers closed by a norm."""
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=Parts(kind).norm)


def merger_mlp(kind: str) -> MLPSubmodules:
    """The merger's gated MLP; its norm stands apart, with a GELU between."""
    if kind == "te":
        return MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def token_cross_entropy(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Of each token: [S, 1, V / tensor ranks] logits, which it may overwrite, and [S, 1] labels to [S, 1] float32."""
    if kind == "te":
        # It reads the logits as they are, where Megatron's needs them in float32. Capturable: without a comparison of the
        # gradient with 1, for which the processor would wait for the device.
        group = parallel_state.get_tensor_model_parallel_group()
        return lambda logits, labels: te_parallel_cross_entropy(logits, labels, group, is_cg_capturable=True)
    return lambda logits, labels: vocab_parallel_cross_entropy(logits.float(), labels)
