"""Weights moved between Hugging Face and Megatron by the table of `config/weight_map.py`: import and export are two readings.

Both directions and every tensor-parallel slice move rows and columns and never compute: bit-equal in any dtype. No process
groups and no model here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.weight_map import Entry, MappingError, entry, part_of_rank, split_of


def to_megatron(name: str, hf_tensors: Mapping[str, Tensor], shape: ModelShape) -> Tensor:
    """One unsharded Megatron tensor from the Hugging Face tensors that it is made of.

    Args:
        name: the Megatron parameter.
        hf_tensors: Hugging Face name -> tensor; others may be present too.
        shape: the architecture.

    Returns:
        A new tensor of `megatron_names(shape)[name]`, dtype and device of the sources.

    Raises:
        MappingError: no rule covers `name`, a source is missing, or a source has another shape.
    """
    found = entry(name, shape)
    sources = []
    for source, size in zip(found.hf_names, found.hf_shapes, strict=True):
        if source not in hf_tensors:
            raise MappingError(f"{name}: the Hugging Face tensor {source} is missing")
        tensor = hf_tensors[source]
        if tuple(tensor.shape) != size:
            raise MappingError(f"{source}: shape {list(tensor.shape)}, but this architecture has {list(size)}")
        sources.append(tensor.reshape(size[0], *found.shape[1:]))
    return torch.cat([sources[s.source][s.start : s.stop] for s in found.segments])


def to_hf(name: str, tensor: Tensor, shape: ModelShape) -> dict[str, Tensor]:
    """The Hugging Face tensors that one unsharded Megatron tensor (weight or gradient) holds; inverse of `to_megatron`.

    Returns:
        Hugging Face name -> tensor of its shape; a view of `tensor` where the rows are in the same order.

    Raises:
        MappingError: no rule covers `name`, or the tensor has another shape.
    """
    found = entry(name, shape)
    if tuple(tensor.shape) != found.shape:
        raise MappingError(f"{name}: shape {list(tensor.shape)}, but this architecture has {list(found.shape)}")
    if len(found.segments) == 1:
        return {found.hf_names[0]: tensor.reshape(found.hf_shapes[0])}
    targets = hf_rows(found, tensor)
    return {source: target.reshape(size) for source, target, size in zip(found.hf_names, targets, found.hf_shapes, strict=True)}


def hf_rows(found: Entry, tensor: Tensor) -> list[Tensor]:
    """A tensor with the rows of an entry's Megatron tensor, and any columns, as one new tensor of each source's rows."""
    targets = [tensor.new_empty((size[0], *tensor.shape[1:])) for size in found.hf_shapes]
    row = 0
    for s in found.segments:
        targets[s.source][s.start : s.stop] = tensor[row : row + s.stop - s.start]
        row += s.stop - s.start
    return targets


def slice_for_rank(name: str, full_tensor: Tensor, tensor_rank: int, tensor_size: int) -> Tensor:
    """The part of an unsharded Megatron tensor that one tensor rank holds.

    Raises:
        MappingError: no rule covers `name`, or the tensor cannot be divided.
    """
    part = part_of_rank(name, full_tensor.shape, tensor_rank, tensor_size)
    rows = torch.cat([full_tensor[start:stop] for start, stop in part.rows])
    return rows if part.columns is None else rows[:, part.columns[0] : part.columns[1]].contiguous()


def join_ranks(name: str, shards: Sequence[Tensor]) -> Tensor:
    """The unsharded Megatron tensor from the parts of all tensor ranks, in rank order; inverse of `slice_for_rank`.

    Raises:
        MappingError: no rule covers `name`.
    """
    split = split_of(name)
    if split == "whole" or len(shards) == 1:
        return shards[0]
    if split == "gated_rows":
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(list(shards), dim=1 if split == "columns" else 0)
