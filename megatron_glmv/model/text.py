"""The decoder: embeddings, a pipeline stage's layers, and the output layer with its loss.

Shapes: S tokens of this context rank, s of this tensor rank, h channels, V vocabulary; behind the last attention K tokens whose
loss is asked for, k of this tensor rank (all: K = S, k = s).

Source: transformers 5.23.0, models/glm4v/modeling_glm4v.py, `Glm4vTextModel`.
"""

from __future__ import annotations

import copy

from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_glmv.config.model import TextShape
from megatron_glmv.model.inputs import ModelInputs
from megatron_glmv.model.position import text_angles
from megatron_glmv.model.specs import block, text_layer, text_rotation, token_cross_entropy
from megatron_glmv.parallel.mcore import HAVE_APEX


class TextModel(MegatronModule):
    """One pipeline stage (or virtual chunk) of the decoder."""

    def __init__(
        self,
        config: TransformerConfig,
        shape: TextShape,
        kind: str,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        num_layers: int,
    ) -> None:
        super().__init__(config)
        self.shape, self.rotation, self.cross_entropy = shape, text_rotation(kind), token_cross_entropy(kind)
        group = parallel_state.get_tensor_model_parallel_group()
        if pre_process:
            # Not scattered over tensor ranks yet: the pictures' features are laid over the whole row first.
            self.embedding = LanguageModelEmbedding(
                config,
                shape.vocab_size,
                shape.max_positions,
                position_embedding_type="none",
                scatter_to_sequence_parallel=False,
                tp_group=group,
            )
        layers = [text_layer(kind)] * num_layers
        if post_process:
            layers[-1] = text_layer(kind, last=True)
        self.decoder = TransformerBlock(
            config,
            block(layers, kind),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if post_process:
            # Megatron's own layer in both specs: in bf16, and fusing its gradient with apex's extension alone.
            head = copy.copy(config)
            head.gradient_accumulation_fusion = config.gradient_accumulation_fusion and HAVE_APEX
            self.output_layer = ColumnParallelLinear(
                shape.hidden_size,
                shape.vocab_size,
                config=head,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=group,
            )

    def embed(self, tokens: Tensor) -> Tensor:
        """[1, S] ids -> [S, 1, h], the same on every tensor rank."""
        return self.embedding(tokens, None)

    def forward(self, hidden: Tensor | None, inputs: ModelInputs) -> Tensor:
        """Run this stage's layers; `hidden` is [s, 1, h] on the first stage and ignored on others. The last gives [k, 1, h]."""
        shape = self.shape
        angles = text_angles(inputs.positions, shape.rotary_base, shape.rotary_dim, shape.mrope_section)
        rotary = self.rotation.prepare(angles)
        return self.decoder(hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=inputs.segments)

    def logits(self, hidden: Tensor) -> Tensor:
        """[k, 1, h] -> [K, 1, V / tensor ranks]."""
        return self.output_layer(hidden)[0]

    def token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of every token, which may overwrite the logits: [K, 1, V / tensor ranks], [1, K] -> [1, K] float32."""
        # A new view, not a transposition, whose rows would keep the stride K: fused kernels step by it.
        return self.cross_entropy(logits, labels.reshape(-1, 1)).t()
