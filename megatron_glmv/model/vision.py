"""The vision tower: patches to features, out of Megatron's tensor- and sequence-parallel layers.

Shapes: N patches, n patches of this tensor rank (all, without sequence parallelism), D channels.

Source: transformers 5.23.0, models/glm4v/modeling_glm4v.py, `Glm4vVisionModel`.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from megatron_glmv.config.model import VisionShape
from megatron_glmv.model.inputs import VisionInputs
from megatron_glmv.model.norm import RMSNorm
from megatron_glmv.model.position import table_weights, vision_angles
from megatron_glmv.model.specs import block, vision_layer, vision_rotation
from megatron_glmv.parallel import platform
from megatron_glmv.sequence.patches import normalize_patches


def mark_partial(module: nn.Module, config: TransformerConfig) -> None:
    """Have the gradients of `module`, replicated over tensor ranks that each see a part of the tokens, summed over them."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def tensor_share(x: Tensor, config: TransformerConfig) -> Tensor:
    """This tensor rank's part of the first axis under sequence parallelism, else all of it."""
    if not config.sequence_parallel:
        return x
    return x.chunk(config.tensor_model_parallel_size)[parallel_state.get_tensor_model_parallel_rank()]


def vision_groups(config: TransformerConfig) -> ProcessGroupCollection:
    """The groups of a tower's layers: Megatron's own, or this rank alone where the tower is not cut over tensor ranks."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if config.tensor_model_parallel_size == 1:
        # Of one rank, for the model has no experts; and Megatron has made it already, on every rank.
        groups.tp = parallel_state.get_expert_model_parallel_group()
    return groups


class VisionModel(MegatronModule):
    """Patch embedding (one matrix product), position table, and a stack of ViT layers with attention by frame."""

    def __init__(self, config: TransformerConfig, shape: VisionShape, kind: str) -> None:
        super().__init__(config)
        groups = vision_groups(config)
        self.shape, self.rotation = shape, vision_rotation(kind)
        options = {"dtype": config.params_dtype, "device": platform.device()}
        self.patch_embed = nn.Linear(shape.patch_dim, shape.hidden_size, **options)
        self.position_embedding = nn.Embedding(shape.position_grid**2, shape.hidden_size, **options)
        self.post_conv_layernorm = RMSNorm(config, shape.hidden_size, shape.norm_epsilon)
        self.decoder = TransformerBlock(config, block([vision_layer(kind)] * shape.num_layers, kind), pg_collection=groups)
        for module in (self.patch_embed, self.position_embedding):
            mark_partial(module, config)

    def forward(self, inputs: VisionInputs) -> Tensor:
        """[n, 1, D] features of this tensor rank's patches, normed; N is a multiple of merge^2 x tensor ranks."""
        dtype = self.config.params_dtype
        patches = tensor_share(inputs.patches, self.config)
        if patches.dtype == torch.uint8:
            patches = normalize_patches(patches, dtype)
        hidden = self.post_conv_layernorm(self.patch_embed(patches.to(dtype)))
        weights = table_weights(tensor_share(inputs.coordinates.t(), self.config).t(), self.shape.position_grid)
        hidden = hidden + (weights @ self.position_embedding.weight.float()).to(dtype)
        rotary = self.rotation.prepare(vision_angles(inputs.coordinates[0], inputs.coordinates[1], self.shape.head_dim))
        return self.decoder(hidden.unsqueeze(1), attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=inputs.segments)
