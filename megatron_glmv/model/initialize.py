"""Random first weights that do not depend on the layout: each parameter is drawn whole, seeded by its name, then cut.

As in transformers, matrices are normal(0, init_std), biases zero and norms one, but for two things that decide how soon a model
from random weights learns to see. The ViT's position table is added to patches that were just normed, so it starts at their
scale: at 0.02 the columns of a picture cannot be told apart. The norms that close the decoder's branches start at
0.4 / sqrt(layers), so that all branches together do not drown the embeddings in the residual stream.

Source: transformers 5.23.0, `PreTrainedModel._init_weights`; arXiv 2504.07866, section 2 (depth-scaled sandwich norm).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_glmv.model.glm4v import Glm4vModel

POST_NORMS = ("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")
POST_NORM_SCALE = 0.4
POSITION_TABLE = "vision_model.position_embedding.weight"


@torch.no_grad()
def initialize_weights(chunks: Sequence[Glm4vModel], seed: int, std: float) -> None:
    """Fill every parameter of this rank's chunks; `std` is that of the matrices."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith(POST_NORMS):
                parameter.fill_(POST_NORM_SCALE * chunk.shape.text.num_layers**-0.5)
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                generator = torch.Generator().manual_seed(zlib.crc32(_global_name(chunk, name).encode()) + seed)
                scale = 1.0 if name.endswith(POSITION_TABLE) else std
                parameter.copy_(_draw_share(parameter, name, generator, scale))


def _global_name(chunk: nn.Module, name: str) -> str:
    """The parameter's name with the layer's number in the whole model instead of in this chunk."""
    match = re.match(r"(language_model\.decoder\.layers\.\d+)\.", name)
    if match is None:
        return name
    layer = chunk.get_submodule(match.group(1))
    return f"language_model.decoder.layers.{int(layer.layer_number) - 1}.{name[match.end() :]}"  # type: ignore[arg-type]


def _draw_share(parameter: Tensor, name: str, generator: torch.Generator, std: float) -> Tensor:
    """This tensor rank's part of the whole parameter, drawn on the CPU in fp32."""
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
    axis: int = getattr(parameter, "partition_dim")  # noqa: B009  (set by Megatron on its own parameters)
    shape = list(parameter.shape)
    shape[axis] *= size
    whole = torch.empty(shape).normal_(0.0, std, generator=generator)
    # A gated product holds gate and up one after the other on every rank; each is cut by itself.
    parts = whole.chunk(2, axis) if "linear_fc1" in name else (whole,)
    return torch.cat([part.chunk(size, axis)[rank] for part in parts], axis)
