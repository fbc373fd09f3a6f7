"""GLM-4.1V on one rank: the vision tower and merger on the first pipeline stage, this stage's part of the decoder.

Source: transformers 5.23.0, models/glm4v/modeling_glm4v.py, `Glm4vForConditionalGeneration`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor

from megatron_glmv.config.fp8 import usable_precision
from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.parallel import ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_glmv.model.entropy import vocab_parallel_entropy
from megatron_glmv.model.inputs import ModelInputs, VisionInputs
from megatron_glmv.model.layers import mark_tensor_parallel
from megatron_glmv.model.projector import VisionProjection
from megatron_glmv.model.text import TextModel
from megatron_glmv.model.vision import VisionModel
from megatron_glmv.parallel.mcore import fuses_gradients, hardware, layer_kind, merger_config, text_config, vision_config

PARTS = {"vision": "vision_model", "merger": "vision_projection", "text": "language_model"}
"""The configuration's names of the model's parts, and the modules that hold them."""


class Glm4vModel(MegatronModule):
    """What one rank holds of the model."""

    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False

    def __init__(
        self,
        shape: ModelShape,
        config: TransformerConfig,
        vision: TransformerConfig,
        merger: TransformerConfig,
        kind: str,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config)
        self.shape, self.pre_process, self.post_process, self.vp_stage = shape, pre_process, post_process, vp_stage
        if pre_process:
            self.vision_model = VisionModel(vision, shape.vision, kind)
            self.vision_projection = VisionProjection(merger, shape.vision, kind)
        self.language_model = TextModel(
            config,
            shape.text,
            kind,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            num_layers=get_num_layers_to_build(config, vp_stage, parallel_state.get_pipeline_model_parallel_rank()),
        )

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """Megatron's schedule hands over the previous stage's output here."""
        single = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.language_model.decoder.set_input_tensor(single)

    def set_is_first_microbatch(self) -> None:
        """Have the FP8 copies of weights made anew in the next forward pass; they are kept for the micro-batches of a step.

        Megatron's schedule asks the model, which answers by the decoder's configuration; the towers have recipes of their own.
        """
        for part in PARTS.values():
            if hasattr(self, part):
                getattr(self, part).set_is_first_microbatch()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Megatron's; of a tower that is not cut over tensor ranks, the first of them writes."""
        tree = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.pre_process and self.vision_model.config.tensor_model_parallel_size < self.config.tensor_model_parallel_size:
            rank = parallel_state.get_tensor_model_parallel_rank()
            for name, shard in tree.items():
                if name.removeprefix(prefix).startswith(("vision_model.", "vision_projection.")):
                    shard.replica_id = (shard.replica_id[0], rank, *shard.replica_id[2:])
        return tree

    def forward(
        self,
        inputs: ModelInputs,
        *,
        return_logits: bool = False,
        temperature: float = 1.0,
        entropy: Literal["none", "report", "learn"] = "none",
    ) -> Tensor:
        """Run this stage on one row.

        Args:
            inputs: the row, cut for this rank.
            return_logits: on the last stage, return logits instead of losses.
            temperature: that the logits are divided by.
            entropy: on the last stage, return the entropy of every token's distribution beside its loss: to report it, or with
                a gradient, which keeps a whole distribution for every token.

        Returns:
            On the last stage [1, K] float32 losses of the tokens of `inputs.label_index` ([2, 1, K] losses and entropies in
            nats; or [K, 1, vocabulary / tensor ranks] logits), on others [s, 1, hidden] for the next stage.
        """
        hidden = self._embed(inputs) if self.pre_process else None
        hidden = self.language_model(hidden, inputs)
        if not self.post_process:
            return hidden
        logits = self.language_model.logits(hidden)
        if temperature != 1.0:
            logits = logits.float() / temperature  # as engines do: not rounded twice
        if return_logits:
            return logits
        if entropy == "none":
            return self.language_model.token_losses(logits, inputs.labels)
        # First: the cross-entropy overwrites float32 logits.
        group = parallel_state.get_tensor_model_parallel_group()
        entropies = vocab_parallel_entropy(logits, group, learn=entropy == "learn").t()
        return torch.stack((self.language_model.token_losses(logits, inputs.labels), entropies))

    def _embed(self, inputs: ModelInputs) -> Tensor:
        """Embeddings with the pictures' features laid over their placeholders: [s, 1, hidden]."""
        embeddings = self.language_model.embed(inputs.tokens)
        if inputs.vision is not None:
            features = self._features(inputs.vision)
            taken = features.index_select(0, inputs.vision.feature_index).to(embeddings.dtype)
            embeddings = embeddings.index_copy(0, inputs.vision.token_index, taken)
            if not len(inputs.vision.token_index):
                embeddings = embeddings + 0.0 * features.sum().to(embeddings.dtype)
        if self.config.sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings)
        return embeddings

    def _features(self, vision: VisionInputs) -> Tensor:
        """[V, 1, hidden] merged features of all frames, the same on every tensor rank."""
        features = self.vision_projection(self.vision_model(vision))
        if vision.num_shared:
            # Gradients are summed over the ranks: context ranks have read different tokens; the sum of the tensor ranks, which
            # have read the same ones, becomes their mean with the parameters' gradients (`share_gradients`).
            features = F.pad(features, (0, 0, 0, 0, 0, vision.num_shared - len(features)))
            group = parallel_state.get_tensor_and_context_parallel_group()
            return gather_from_sequence_parallel_region(features, tensor_parallel_output_grad=True, group=group)
        if self.config.sequence_parallel and self.vision_model.config.sequence_parallel:
            # Every tensor rank goes on to compute the same embeddings, so the gradient is cut, not summed.
            features = gather_from_sequence_parallel_region(features, tensor_parallel_output_grad=False)
        return features


def share_gradients(*modules: MegatronModule) -> None:
    """Have Megatron average the gradients of modules over tensor ranks that have each encoded other frames of the same rows.

    Transformer Engine marks every weight of a column- or row-parallel layer as a share, also where one rank holds all of it;
    the gradient norm would count it once for every tensor rank.
    """
    for module in modules:
        for parameter in module.parameters():
            parameter.average_gradients_across_tp_domain = True
            if getattr(parameter, "tensor_model_parallel", False):
                parameter.tensor_model_parallel = False


def build_model(
    shape: ModelShape,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    recompute: RecomputeConfig,
    *,
    megatron: dict[str, Any] | None = None,
    freeze: Sequence[str] = (),
    accumulates: bool = False,
) -> list[Glm4vModel]:
    """Build this rank's model: one chunk, or one for each virtual pipeline stage.

    Args:
        shape: the model's numbers.
        parallel: the layout.
        precision: number formats; FP8 that the device does not have is left out.
        recompute: activation recomputation.
        megatron: the user's own fields of the decoder's configuration.
        freeze: parts that do not learn.
        accumulates: the model will train under Megatron's DDP, to whose gradients products can add directly.

    Raises:
        ConfigError: Transformer Engine is asked for where it cannot run, or a Megatron field is refused.
    """
    kind = layer_kind(precision)
    precision = usable_precision(precision, hardware()).precision
    config = text_config(shape, parallel, precision, recompute, megatron)
    vision = vision_config(shape, parallel, precision, recompute)
    merger = merger_config(shape, parallel, precision)
    if accumulates and fuses_gradients(kind) and "gradient_accumulation_fusion" not in (megatron or {}):
        for fused in (config, vision, merger):
            fused.gradient_accumulation_fusion = True
    chunks = []
    for chunk in range(parallel.virtual_pipeline):
        vp_stage = chunk if parallel.virtual_pipeline > 1 else None
        chunks.append(
            Glm4vModel(
                shape,
                config,
                vision,
                merger,
                kind,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                vp_stage=vp_stage,
            )
        )
    for model in chunks:
        mark_tensor_parallel(model)
        if parallel.vision == "images" and model.pre_process:
            share_gradients(model.vision_model, model.vision_projection)
        for part in freeze:
            module = getattr(model, PARTS[part], None)
            if module is not None:
                module.requires_grad_(False)
    return chunks
