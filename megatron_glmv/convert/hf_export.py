"""Weights under Hugging Face names: gathered from the ranks of a live model, or read from a checkpoint into a folder.

Both go one tensor at a time, so that memory does not grow with the model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_glmv.config.base import validate
from megatron_glmv.config.model import ModelShape
from megatron_glmv.convert.hf_config import config_json, generation_config_json
from megatron_glmv.convert.hf_folder import write_weights
from megatron_glmv.convert.lora import open_weights
from megatron_glmv.convert.mapping import MappingError, entries, hf_names, join_ranks, split_of, to_hf
from megatron_glmv.convert.parameters import Owner, adapters_of_weights, local_parameters, pipeline_owners
from megatron_glmv.parallel import platform

NEEDED_PROCESSOR_FILES = (
    ("tokenizer.json",),
    ("tokenizer_config.json",),
    ("chat_template.jinja", "chat_template.json"),
    ("preprocessor_config.json", "processor_config.json"),
)
"""One file of each group must be there; without them the exported folder answers nothing."""
PROCESSOR_FILES = (
    *(name for names in NEEDED_PROCESSOR_FILES for name in names),
    "video_preprocessor_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""What is copied; never weights or code."""


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
        tensor = _join_shards(name, shard) if shard is not None else None
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


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    folder: Path
    num_tensors: int
    num_parameters: int
    dtype: str


def export_checkpoint(
    checkpoint_folder: Path, hf_folder: Path, processor_folder: Path, max_shard_bytes: int = 5_000_000_000
) -> ExportReport:
    """Write one complete checkpoint, saved in any layout, as a Hugging Face folder; needs no process groups.

    Everything is written into a sibling that gets the final name last, so `hf_folder` is complete or absent.

    Args:
        checkpoint_folder: one complete checkpoint of a run.
        hf_folder: must not exist.
        processor_folder: with the tokenizer, the chat template and the processors' settings, which are copied.
        max_shard_bytes: largest safetensors file.

    Raises:
        MappingError: `hf_folder` exists, the processor folder lacks a file, or the checkpoint cannot be read, or its tensors
            are not those of its architecture, or the disk is full or refuses.
    """
    if hf_folder.exists():
        raise MappingError(f"{hf_folder}: exists already; remove it or choose another folder")
    processor_files = _processor_files(processor_folder)
    shape = checkpoint_shape(checkpoint_folder)
    stored = open_weights(checkpoint_folder, shape)
    partial = hf_folder.with_name(hf_folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dtypes = {name: stored.dtype(found.name) for found in entries(shape).values() for name in found.hf_names}
        tensors = (pair for name in entries(shape) for pair in to_hf(name, stored.read(name), shape).items())
        write_weights(partial, hf_names(shape), dtypes, tensors, max_shard_bytes)
        dtype = str(dtypes["lm_head.weight"]).removeprefix("torch.")
        for name, tree in (
            ("config.json", config_json(shape, dtype)),
            ("generation_config.json", generation_config_json(shape)),
        ):
            (partial / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        for file in processor_files:
            shutil.copyfile(file, partial / file.name)
        partial.rename(hf_folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise MappingError(f"{hf_folder}: cannot be written ({error.strerror}); nothing of it was left") from error
        raise
    num_parameters = sum(math.prod(size) for size in hf_names(shape).values())
    return ExportReport(hf_folder, len(dtypes), num_parameters, dtype)


def checkpoint_shape(folder: Path) -> ModelShape:
    """The architecture that a checkpoint's manifest names.

    Raises:
        MappingError: no manifest, or not one of a checkpoint.
    """
    path = folder / "meta.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))["shape"]
    except OSError as error:
        raise MappingError(f"{path}: cannot be read ({error.strerror}); is {folder} one complete checkpoint?") from None
    except (ValueError, KeyError, TypeError):
        raise MappingError(f"{path}: not the manifest of a checkpoint") from None
    return validate(ModelShape, tree, where=str(path))


def _processor_files(folder: Path) -> list[Path]:
    for names in NEEDED_PROCESSOR_FILES:
        if not any((folder / name).is_file() for name in names):
            raise MappingError(f"{folder}: no {' or '.join(names)}; name the folder that glmv-data train-tokenizer wrote")
    return [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]
