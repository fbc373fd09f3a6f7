"""The merger: 2 x 2 patches become one token of the decoder's width.

Shapes: n patches and v = n / 4 merged tokens of this tensor rank (all, without sequence parallelism), D and O channels.

Source: transformers 5.23.0, models/glm4v/modeling_glm4v.py, `Glm4vVisionModel.downsample` and `Glm4vVisionPatchMerger`.
"""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_glmv.config.model import VisionShape
from megatron_glmv.model.norm import LayerNorm
from megatron_glmv.model.specs import merger_mlp
from megatron_glmv.model.vision import mark_partial, vision_groups
from megatron_glmv.parallel import platform


class VisionProjection(MegatronModule):
    """Downsample (a strided convolution as one product), projection, norm, GELU and a gated MLP."""

    def __init__(self, config: TransformerConfig, shape: VisionShape, kind: str) -> None:
        super().__init__(config)
        options = {"dtype": config.params_dtype, "device": platform.device()}
        self.block = shape.spatial_merge_size**2
        self.downsample = nn.Linear(shape.hidden_size * self.block, shape.out_hidden_size, **options)
        self.proj = nn.Linear(shape.out_hidden_size, shape.out_hidden_size, bias=False, **options)
        self.norm = LayerNorm(config, shape.out_hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(
            config,
            merger_mlp(kind),
            ffn_hidden_size=shape.merger_ffn_hidden_size,
            tp_group=vision_groups(config).tp,
        )
        for module in (self.downsample, self.proj):
            mark_partial(module, config)

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, 1, D] -> [v, 1, O]."""
        blocks = hidden.view(-1, self.block, hidden.size(-1)).transpose(1, 2).flatten(1)
        merged = self.proj(self.downsample(blocks))
        activated = F.gelu(self.norm(merged)).unsqueeze(1)
        with get_fp8_context(self.config):  # a TransformerBlock enters it by itself; without FP8 it does nothing
            return self.mlp(activated)[0]
