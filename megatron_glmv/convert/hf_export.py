"""Weights under Hugging Face names: gathered from the ranks of a live model, or read from a checkpoint into a folder.

Both go one tensor at a time, so that memory does not grow with the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.weight_map import entries, hf_names, split_of
from megatron_glmv.convert.checkpoint_tensors import Stored
from megatron_glmv.convert.hf_config import config_json
from megatron_glmv.convert.hf_folder import write_weights
from megatron_glmv.convert.lora import open_weights
from megatron_glmv.convert.mapping import join_ranks, to_hf
from megatron_glmv.convert.new_folder import new_folder
from megatron_glmv.convert.parameters import Owner, adapters_of_weights, local_parameters, pipeline_owners
from megatron_glmv.convert.processor import check_processor, copy_processor
from megatron_glmv.parallel import platform
from megatron_glmv.run_folder.checkpoint_folder import read_manifest, shape_of


def gather_hf_tensors(
    model_chunks: Sequence[Module], shape: ModelShape, read: Callable[[Parameter], Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor of a live model, in the order of `mapping.hf_names`.

    Collective over the tensor and pipeline ranks of the first replica: all of them must exhaust the iterator, and only global
    rank 0 gets anything out of it. Other replicas get nothing and do not wait.

    Args:
        model_chunks: the rank's chunks of the model.
        shape: the architecture.
        read: what to take of each parameter, for instance its main_grad; the parameter's shape. None: its value, with the
            adapters of LoRA merged into it.

    Yields:
        (name, tensor) on the parameters' device.

    Raises:
        MappingError: a parameter that no rule covers, or one that is missing.
    """
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        return
    adapters = adapters_of_weights(model_chunks) if read is None else {}
    own = local_parameters(model_chunks).items()
    local = {name: (parameter if read is None else read(parameter)).detach() for name, parameter in own}
    owners = pipeline_owners(local, shape)
    for name, found in entries(shape).items():
        shard = adapters[name].merge(local[name]).detach() if name in adapters else local.get(name)
        tensor = _join_shards(name, shard, found.shape) if shard is not None else None
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            tensor = _to_first_stage(tensor, owners[name], found.shape)
        if tensor is not None and dist.get_rank() == 0:
            yield from to_hf(name, tensor, shape).items()


def _join_shards(name: str, local: Tensor, full_shape: tuple[int, ...]) -> Tensor | None:
    """The unsharded tensor on tensor rank 0 of this stage; None on the others."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    if (
        size == 1 or split_of(name) == "whole" or local.shape == full_shape
    ):  # the last: a tower that is not cut over tensor ranks
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


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    folder: Path
    num_tensors: int
    num_parameters: int
    dtype: str


def export_checkpoint(
    checkpoint: Path,
    hf_folder: Path,
    processor: Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    check: Callable[[Path, Stored], object] | None = None,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> ExportReport:
    """Write one complete checkpoint, saved in any layout, as a Hugging Face folder; needs no process groups.

    Args:
        checkpoint: one complete checkpoint.
        hf_folder: must not exist; it is complete or absent, whatever happens.
        processor: with the tokenizer, the chat template and the processors' settings, which are copied.
        max_shard_bytes: largest safetensors file.
        check: is called with the finished folder, before it gets its name, and the tensors that were written; what it raises
            leaves nothing.
        progress: is told the number of bytes of each tensor.

    Raises:
        CheckpointError: not one complete checkpoint.
        MappingError: `hf_folder` exists, the processor folder lacks a file or does not fit, the checkpoint cannot be read, its
            tensors are not those of its architecture, or the disk is full or refuses.
    """
    shape = shape_of(checkpoint, read_manifest(checkpoint))
    stored = open_weights(checkpoint, shape)
    check_processor(processor, shape)
    dtypes = {name: stored.dtype(found.name) for found in entries(shape).values() for name in found.hf_names}
    num_bytes = sum(math.prod(size) * dtypes[name].itemsize for name, size in hf_names(shape).items())
    with new_folder(hf_folder, num_bytes) as partial:
        write_weights(partial, hf_names(shape), dtypes, _hf_tensors(stored, shape, progress), max_shard_bytes)
        dtype = str(dtypes["lm_head.weight"]).removeprefix("torch.")
        (partial / "config.json").write_text(json.dumps(config_json(shape, dtype), indent=2) + "\n", encoding="utf-8")
        copy_processor(processor, partial, shape)
        if check is not None:
            check(partial, stored)
    num_parameters = sum(math.prod(size) for size in hf_names(shape).values())
    return ExportReport(hf_folder, len(dtypes), num_parameters, dtype)


def _hf_tensors(stored: Stored, shape: ModelShape, progress: Callable[[int], object]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its Hugging Face name, in the order of `hf_names`; the next is read while one is written."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(stored.read, next(iter(entries(shape))))
        for name, following in pairwise([*entries(shape), None]):
            tensor = coming.result()
            if following is not None:
                coming = reader.submit(stored.read, following)
            assert name is not None
            yield from to_hf(name, tensor, shape).items()
            progress(tensor.nbytes)
