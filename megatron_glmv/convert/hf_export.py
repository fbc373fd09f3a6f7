"""A live model's weights (or gradients) under Hugging Face names, gathered from all its ranks one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_glmv.config.model import ModelShape
from megatron_glmv.convert.mapping import entries, join_ranks, split_of, to_hf
from megatron_glmv.convert.parameters import Owner, local_parameters, pipeline_owners
from megatron_glmv.parallel import platform


def gather_hf_tensors(
    model_chunks: Sequence[Module], shape: ModelShape, read: Callable[[Parameter], Tensor] = Parameter.detach
) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor of a live model, in the order of `mapping.hf_names`.

    Collective over the tensor and pipeline ranks of the first replica: all of them must exhaust the iterator, and only global
    rank 0 gets anything out of it. Other replicas get nothing and do not wait.

    Args:
        model_chunks: the rank's chunks of the model.
        shape: the architecture.
        read: what to take of each parameter: itself, or for instance its main_grad; the parameter's shape.

    Yields:
        (name, tensor) on the parameters' device.

    Raises:
        MappingError: a parameter that no rule covers, or one that is missing.
    """
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        return
    local = {name: read(parameter).detach() for name, parameter in local_parameters(model_chunks).items()}
    owners = pipeline_owners(local, shape)
    for name, found in entries(shape).items():
        tensor = _join_shards(name, local[name]) if name in local else None
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            tensor = _to_first_stage(tensor, owners[name], found.shape)
        if tensor is not None and dist.get_rank() == 0:
            yield from to_hf(name, tensor, shape).items()


def _join_shards(name: str, local: Tensor) -> Tensor | None:
    """The unsharded tensor on tensor rank 0 of this stage; None on the others."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1 or split_of(name) == "whole":
        return local if rank == 0 else None
    local = local.contiguous()
    shards = [torch.empty_like(local) for _ in range(size)] if rank == 0 else None
    dist.gather(local, shards, group=parallel_state.get_tensor_model_parallel_group(), group_dst=0)
    return join_ranks(name, shards) if shards is not None else None


def _to_first_stage(tensor: Tensor | None, owner: Owner, full_shape: tuple[int, ...]) -> Tensor | None:
    """Move a tensor from the stage that holds it to the first one; None on the other stages."""
    group = parallel_state.get_pipeline_model_parallel_group()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    if owner.stage == 0:
        return tensor
    if stage == owner.stage:
        assert tensor is not None
        dist.send(tensor.contiguous(), group=group, group_dst=0)
    elif stage == 0:
        received = torch.empty(full_shape, dtype=owner.dtype, device=platform.device())
        dist.recv(received, group=group, group_src=owner.stage)
        return received
    return None
