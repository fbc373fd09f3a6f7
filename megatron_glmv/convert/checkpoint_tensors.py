"""The weights in a distributed checkpoint, read one tensor of one layer at a time, without process groups and without a model.

Megatron stores the layers of a tower as one tensor with a leading layer axis, cut into the chunks that the ranks saved, and a
gated product as [gate; up] whatever the tensor-parallel size was, so a Megatron name is a key and perhaps a layer of it.
Adapters, which not every layer needs to have, are stored layer by layer.

Source: megatron-core 0.16.1, transformer/transformer_block.py (`sharded_state_dict`), dist_checkpointing/strategies/torch.py;
torch 2.13.0, distributed/checkpoint/filesystem.py.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.weight_map import MappingError, check_names, entry, megatron_names
from megatron_glmv.model.lora import ADAPTER, has_adapter

_LAYER = re.compile(r"(?<=\.layers)\.(\d+)(?=\.)")
_MODULES = ("vision_model.", "vision_projection.", "language_model.")
_PLAIN_CLASSES = {
    "torch": {"Size", *(f"{kind}{bits}" for kind in ("float", "int", "uint") for bits in (8, 16, 32, 64)), "bfloat16", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}
"""What the index of a checkpoint is made of; anything else in it is refused, so that reading one executes nothing."""


class Stored(Protocol):
    """Megatron tensors of a checkpoint."""

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor."""

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One unsharded tensor, or the rows (first, last) of it."""


class CheckpointTensors:
    """The model's tensors of one checkpoint.

    Attributes:
        adapters: names of the adapters' tensors in the whole model, <module>.adapter.lora_A and .lora_B; none without LoRA.

    Args:
        folder: of one complete checkpoint.
        shape: the architecture that it was saved with.

    Raises:
        MappingError: not a checkpoint, or one whose tensors are not exactly those of the architecture.
    """

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        self.folder, self.shape = folder, shape
        metadata = read_index(folder)
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored = {
            _adapter_name(key) if has_adapter(key) else key: (key, stored)
            for key, stored in metadata.state_dict_metadata.items()
            if key.startswith(_MODULES) and isinstance(stored, TensorStorageMetadata)
        }
        self.adapters = {name for name in self._stored if has_adapter(name)}
        weights = self._stored.keys() - self.adapters
        check_names(weights, {split_layer(name)[0] for name in megatron_names(shape)}, str(folder))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a Megatron parameter, or one of `adapters`, was saved."""
        return self._stored[name if name in self.adapters else split_layer(name)[0]][1].properties.dtype

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One unsharded Megatron tensor, or the rows (first, last) of it.

        Raises:
            MappingError: it has another shape than the architecture, or its chunks are missing or cut off.
        """
        key, layer = split_layer(name)
        return self._read(key, name, entry(name, self.shape).shape, layer, rows)

    def read_adapter(self, name: str, full: tuple[int, ...]) -> Tensor:
        """One unsharded tensor of `adapters`, which must have the shape `full`.

        Raises:
            MappingError: as `read`, or the checkpoint has no such adapter.
        """
        if name not in self.adapters:
            raise MappingError(f"{self.folder}: missing {name}")
        return self._read(name, name, full, None, None)

    def _read(
        self, stored_name: str, name: str, full: tuple[int, ...], layer: int | None, rows: tuple[int, int] | None
    ) -> Tensor:
        (key, stored), (start, stop) = self._stored[stored_name], rows or (0, full[0])
        offsets, sizes = ([], []) if layer is None else ([layer], [1])
        offsets, sizes = [*offsets, start, *[0] * (len(full) - 1)], [*sizes, stop - start, *full[1:]]
        if len(stored.size) != len(sizes) or list(stored.size[-len(full) :]) != list(full):
            raise MappingError(
                f"{self.folder}: {key} has shape {list(stored.size)}, this architecture has layers of {list(full)}"
            )
        target = torch.empty(sizes, dtype=stored.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise MappingError(f"{self.folder}: the chunks of {key} do not cover {name}")
        try:
            self._reader.read_data(LoadPlan(items), _IntoTensor(target))
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise MappingError(f"{self.folder}: {name} cannot be read ({' '.join(str(error).split())[:200]})") from error
        return target.reshape(stop - start, *full[1:])


def split_layer(name: str) -> tuple[str, int | None]:
    """The key under which a Megatron parameter is stored, and its layer there; None outside the towers' layers."""
    layer = _LAYER.search(name)
    return _LAYER.sub("", name), int(layer[1]) if layer else None


def _adapter_name(key: str) -> str:
    """The name in the whole model of an adapter's tensor, whose key has the layer's number behind the adapter's name."""
    return re.sub(rf"\.layers\.(.*\.{ADAPTER})\.(\d+)\.", r".layers.\2.\1.", key)


class _IntoTensor(DefaultLoadPlanner):
    """Puts what is read into the right place of one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The view of the target that a piece is read into."""
        return narrow_tensor_by_index(self._target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: `resolve_tensor` gave a view."""


class _IndexUnpickler(pickle.Unpickler):
    """Makes descriptions of tensors and nothing else, so that nothing in an index is executed."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _PLAIN_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return super().find_class(module, name)


def read_index(folder: Path) -> Metadata:
    """The index of a checkpoint's tensors, from which nothing can be executed.

    Raises:
        MappingError: missing, broken, or it holds anything but plain descriptions of tensors.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as stream:
            metadata = _unpickle(stream)
    except OSError as error:
        raise MappingError(f"{path}: cannot be read ({error.strerror}); is {folder} one complete checkpoint?") from None
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, IndexError, TypeError) as error:
        raise MappingError(f"{path}: not the index of a checkpoint ({error})") from None
    if not isinstance(metadata, Metadata):
        raise MappingError(f"{path}: not the index of a checkpoint")
    return metadata


def _unpickle(stream: BinaryIO) -> Any:
    return _IndexUnpickler(stream).load()
