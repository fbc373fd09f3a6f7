"""Hugging Face weights into a live model: every rank reads only the rows and columns that it holds, straight into place.

Called before the optimizer is built, because the optimizer copies the weights that it finds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.weight_map import Entry, MappingError, check_hf_shapes, entry, part_of_rank, rank_segments
from megatron_glmv.convert.hf_folder import HfWeights
from megatron_glmv.convert.parameters import local_parameters, pipeline_owners


class _Source(Protocol):
    """Hugging Face tensors that can be read in slices."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, start: int, stop: int, columns: tuple[int, int] | None) -> Tensor:
        """Rows `start` to before `stop`; of them the columns from the first to before the second number, or all."""


class _StateDict:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str, start: int, stop: int, columns: tuple[int, int] | None) -> Tensor:
        rows = self._tensors[name][start:stop]
        return rows if columns is None else rows[:, columns[0] : columns[1]]


def load_hf_weights(model_chunks: Sequence[Module], folder: Path, shape: ModelShape) -> None:
    """Fill a rank's parameters from a Hugging Face folder; every rank calls it.

    Args:
        model_chunks: the rank's chunks of the model.
        folder: with model.safetensors, or shards and their index.
        shape: the architecture.

    Raises:
        MappingError: a tensor that no rule covers, one that is missing or has another shape, a shard that is missing or cut
            off, or a parameter of the model that no rule covers. Nothing is filled then, except for a shard found unreadable
            on the way.
    """
    _fill(model_chunks, HfWeights(folder), shape, str(folder))


def from_state_dict(model_chunks: Sequence[Module], hf_state_dict: Mapping[str, Tensor], shape: ModelShape) -> None:
    """Fill a rank's parameters from Hugging Face tensors in memory; every rank calls it.

    Raises:
        MappingError: as `load_hf_weights`.
    """
    _fill(model_chunks, _StateDict(hf_state_dict), shape, "the state dict")


def _fill(model_chunks: Sequence[Module], source: _Source, shape: ModelShape, where: str) -> None:
    check_hf_shapes(source.shapes, shape, where)
    parameters = local_parameters(model_chunks)
    pipeline_owners(parameters, shape)
    for name, parameter in parameters.items():
        _fill_one(entry(name, shape), parameter, source)


@torch.no_grad()
def _fill_one(found: Entry, parameter: Parameter, source: _Source) -> None:
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    if parameter.shape == found.shape:  # also of a tower that is not cut over tensor ranks
        rank, size = 0, 1
    part = part_of_rank(found.name, found.shape, rank, size)
    rows = sum(stop - start for start, stop in part.rows)
    columns = [part.columns[1] - part.columns[0]] if part.columns else found.shape[1:]
    if list(parameter.shape) != [rows, *columns]:
        raise MappingError(
            f"{found.name}: tensor rank {rank} of {size} holds {list(parameter.shape)}, but its part of {list(found.shape)} "
            f"is {[rows, *columns]}"
        )
    row = 0
    for s in rank_segments(found, part):
        target = parameter[row : row + s.stop - s.start]
        target.copy_(source.read(found.hf_names[s.source], s.start, s.stop, part.columns).reshape(target.shape))
        row += s.stop - s.start
