"""Random first weights that do not depend on the layout: each parameter is drawn whole, seeded by its name, then cut.

As in transformers, matrices are normal(0, init_std), biases zero and norms one, but for two things that decide how soon a model
from random weights learns to see. The ViT's position table is added to patches that were just normed, so it starts at their
scale: at 0.02 the columns of a picture cannot be told apart. The norms that close the decoder's branches start at
0.4 / sqrt(layers), so that all branches together do not drown the embeddings in the residual stream.

Adapters start as peft's do: A uniform within 1 / sqrt(inputs), B zero.

Source: transformers 5.23.0, `PreTrainedModel._init_weights`; arXiv 2504.07866, section 2 (depth-scaled sandwich norm); peft
0.21.2, tuners/lora/layer.py (`reset_lora_parameters`: kaiming-uniform with a = sqrt(5)).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_glmv.model.glm4v import Glm4vModel
from megatron_glmv.model.lora import Adapter
from megatron_glmv.model.names import full_module_names

POST_NORMS = ("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")
POST_NORM_SCALE = 0.4
POSITION_TABLE = "vision_model.position_embedding.weight"


@torch.no_grad()
def initialize_weights(chunks: Sequence[Glm4vModel], seed: int, std: float) -> None:
    """Fill every parameter of this rank's chunks; `std` is that of the matrices."""
    for chunk in chunks:
        full = full_module_names(chunk)
        for name, parameter in chunk.named_parameters():
            module, _, own_name = name.rpartition(".")
            generator = torch.Generator().manual_seed(zlib.crc32(f"{full[module]}.{own_name}".encode()) + seed)
            if name.endswith(("bias", "lora_B")):
                parameter.zero_()
            elif name.endswith("lora_A"):
                adapter = chunk.get_submodule(module)
                assert isinstance(adapter, Adapter)
                bound = adapter.plan.inputs**-0.5
                parameter.copy_(_draw_share(parameter, name, lambda t: t.uniform_(-bound, bound, generator=generator)))  # noqa: B023
            elif name.endswith(POST_NORMS):
                parameter.fill_(POST_NORM_SCALE * chunk.shape.text.num_layers**-0.5)
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                scale = 1.0 if name.endswith(POSITION_TABLE) else std
                parameter.copy_(_draw_share(parameter, name, lambda t: t.normal_(0.0, scale, generator=generator)))  # noqa: B023


def _draw_share(parameter: Tensor, name: str, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """This tensor rank's part of the whole parameter, drawn on the CPU in fp32."""
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return draw(torch.empty(parameter.shape))
    axis: int = getattr(parameter, "partition_dim")  # noqa: B009  (set by Megatron on its own parameters)
    shape = list(parameter.shape)
    shape[axis] *= size
    whole = draw(torch.empty(shape))
    # A gated product holds gate and up one after the other on every rank; each is cut by itself.
    parts = whole.chunk(2, axis) if "linear_fc1" in name else (whole,)
    return torch.cat([part.chunk(size, axis)[rank] for part in parts], axis)
