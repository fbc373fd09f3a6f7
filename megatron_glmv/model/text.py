"""The decoder: embeddings, a pipeline stage's layers, and the output layer with its loss.

Shapes: S tokens of this context rank, s of this tensor rank, h channels, V vocabulary.

Source: transformers 5.23.0, models/glm4v/modeling_glm4v.py, `Glm4vTextModel`.
"""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_glmv.config.model import TextShape
from megatron_glmv.model.inputs import ModelInputs
from megatron_glmv.model.position import text_rotary
from megatron_glmv.model.specs import block, text_layer


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
        self.shape = shape
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
        self.decoder = TransformerBlock(
            config,
            block(text_layer(kind), num_layers, kind),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = ColumnParallelLinear(
                shape.hidden_size,
                shape.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=group,
            )

    def embed(self, tokens: Tensor) -> Tensor:
        """[1, S] ids -> [S, 1, h], the same on every tensor rank."""
        return self.embedding(tokens, None)

    def forward(self, hidden: Tensor | None, inputs: ModelInputs) -> Tensor:
        """Run this stage's layers; `hidden` is [s, 1, h] on the first stage and ignored on others."""
        rotary = text_rotary(inputs.positions, self.shape.rotary_base, self.shape.rotary_dim, self.shape.mrope_section)
        return self.decoder(hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=inputs.segments)

    def logits(self, hidden: Tensor) -> Tensor:
        """[s, 1, h] -> [S, 1, V / tensor ranks]."""
        return self.output_layer(hidden)[0]

    def token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of every token: [S, 1, V / tensor ranks], [1, S] -> [1, S] float32."""
        return vocab_parallel_cross_entropy(logits.float(), labels.t().contiguous()).t()
