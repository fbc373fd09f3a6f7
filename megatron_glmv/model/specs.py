"""Two layer specs with equal parameter names: ``te`` (Transformer Engine) and ``torch`` (plain torch, any device).

The ``te`` spec fuses norm and product, runs all segments of a row in one variable-length attention, and computes in FP8
where the configuration says so. The ``torch`` spec computes the same function with SDPA per segment length.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_glmv.model.attention import RotarySelfAttention, SegmentAttention
from megatron_glmv.model.layers import NormColumnParallelLinear, SandwichLayer, SandwichLayerSubmodules, add_residual
from megatron_glmv.model.norm import RMSNorm
from megatron_glmv.model.position import rotate_halves, rotate_pairs
from megatron_glmv.parallel.mcore import HAVE_TE

if HAVE_TE:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )


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


def text_layer(kind: str) -> ModuleSpec:
    """One decoder layer: causal attention by document, norms around both branches."""
    parts = Parts(kind)
    return ModuleSpec(
        module=SandwichLayer,
        submodules=SandwichLayerSubmodules(
            self_attention=parts.attention(parts.causal, rotate_pairs),
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
            self_attention=parts.attention(parts.full, rotate_halves),
            self_attn_bda=add_residual,
            mlp=parts.mlp(),
            mlp_bda=add_residual,
        ),
    )


def block(layer: ModuleSpec, num_layers: int, kind: str) -> TransformerBlockSubmodules:
    """A stack of equal layers closed by a norm."""
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=Parts(kind).norm)


def merger_mlp(kind: str) -> MLPSubmodules:
    """The merger's gated MLP; its norm stands apart, with a GELU between."""
    if kind == "te":
        return MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
