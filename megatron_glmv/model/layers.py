"""The layers that Megatron does not have: norm fused with a column-parallel product in torch, and the sandwich layers.

Source: transformers 5.23.0, models/glm4v/modeling_glm4v.py, `Glm4vTextDecoderLayer`; the names of the fused product's
parameters are those of megatron-core 0.16.1, extensions/transformer_engine.py, `TELayerNormColumnParallelLinear`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_glmv.model.norm import norm_weight, rms_norm
from megatron_glmv.model.segments import Segments

PARTITION = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
"""The axis that tensor ranks share, of the weight of each of Megatron's own parallel modules."""
AddResidual = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm and column-parallel product in one module, with Transformer Engine's parameter names."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = norm_weight(input_size, config)
        self.epsilon = config.layernorm_epsilon

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, input] -> [s x tensor ranks under sequence parallelism, b, output / tensor ranks]."""
        return super().forward(rms_norm(input_, self.layer_norm_weight, self.epsilon), *args, **kwargs)


def mark_tensor_parallel(model: nn.Module) -> None:
    """Tell Megatron which weights are shares of a larger one; it does so itself only where it draws the first weights.

    The gradient norm counts every share, but a replicated parameter once.
    """
    for module in model.modules():
        for kind, axis in PARTITION.items():
            if isinstance(module, kind) and module.tp_group.size() > 1 and not hasattr(module.weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(module.weight, True, axis, 1)


def add_residual(training: bool, fused: bool) -> AddResidual:
    """Megatron's bias-dropout-add where there is neither bias nor dropout."""

    def add(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        return residual + output_and_bias[0]

    return add


@dataclass
class SandwichLayerSubmodules(TransformerLayerSubmodules):
    """A layer with a norm after attention and after the MLP, too."""

    post_self_attn_layernorm: ModuleSpec | type = IdentityOp
    post_mlp_layernorm: ModuleSpec | type = IdentityOp


class SandwichLayer(TransformerLayer):
    """The decoder's layer: each branch is normed before and after, then added."""

    def __init__(self, config: TransformerConfig, submodules: SandwichLayerSubmodules, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        norm = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.post_self_attn_layernorm = build_module(submodules.post_self_attn_layernorm, **norm)
        self.post_mlp_layernorm = build_module(submodules.post_mlp_layernorm, **norm)
        self.self_attn_bda = self._norm_and_add("post_self_attn_layernorm")
        self.mlp_bda = self._norm_and_add("post_mlp_layernorm")

    def _norm_and_add(self, name: str) -> Callable[[bool, bool], AddResidual]:
        """A bias-dropout-add that norms the branch first."""

        def add(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            return residual + getattr(self, name)(output_and_bias[0])

        return lambda training, fused: add


class LastLayer(SandwichLayer):
    """The decoder's last layer: behind its attention no token reads another, so only those go on whose loss is asked for.

    Of a row of pictures, questions and answers that is a fifth or so, and the output layer reads no more.
    """

    def forward(self, *args: Any, packed_seq_params: Segments, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[s, 1, hidden] -> [k, 1, hidden], or [s, 1, hidden] where all go on; and no context."""
        hidden, context = self._forward_attention(*args, packed_seq_params=packed_seq_params, **kwargs)
        if packed_seq_params.going_on is not None:
            hidden = hidden.index_select(0, packed_seq_params.going_on)
        return self._forward_mlp(hidden), context
