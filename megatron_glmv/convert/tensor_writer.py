"""The weights of a distributed checkpoint, written a few rows at a time, without process groups and without a model.

What is written has the form that training's own checkpoints have, so any layout loads it: the layers of a tower are one tensor
with a leading layer axis, and every tensor is cut into chunks of rows. Memory does not grow with the model.

Source: torch 2.13.0, distributed/checkpoint/filesystem.py (`FileSystemWriter`: a plan becomes a file, items are resolved when
they are written) and metadata.py; megatron-core 0.16.1, dist_checkpointing/core.py (`metadata.json`) and strategies/common.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, Metadata
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.weight_map import Entry, entries
from megatron_glmv.convert.checkpoint_tensors import split_layer

CHUNK_BYTES = 64_000_000
"""Largest piece of one tensor: what is held at once when it is written, and what a rank reads that needs any row of it."""
FILE_BYTES = 500_000_000
"""Where a file of the checkpoint ends."""
WRITERS = 2
"""Files that are written at once."""

Source = tuple[Entry, int, int]
"""A piece: rows first to last of an unsharded Megatron tensor."""
ReadRows = Callable[[Entry, int, int], Tensor]
"""(entry, first row, last row) -> those rows of the unsharded Megatron tensor, in memory."""


def write_tensors(
    folder: Path, shape: ModelShape, dtype: torch.dtype, read_rows: ReadRows, progress: Callable[[int], object]
) -> None:
    """Write every weight of an architecture as the tensors of a Megatron checkpoint.

    Args:
        folder: an empty folder.
        shape: the architecture.
        dtype: of every tensor.
        read_rows: where the values come from.
        progress: is told the number of bytes after each piece.

    Raises:
        OSError: the disk is full or refuses.
    """
    plans: list[list[tuple[WriteItem, Source]]] = [[]]
    size = 0
    for item, source in _items(shape, dtype):
        assert item.tensor_data is not None
        num_bytes = item.tensor_data.chunk.sizes.numel() * dtype.itemsize
        if plans[-1] and size + num_bytes > FILE_BYTES:
            plans.append([])
            size = 0
        plans[-1].append((item, source))
        size += num_bytes
    # Each file has a writer of one thread: an error in a thread that torch starts itself would not reach us.
    writer = _Writer(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    writer.set_up_storage_writer(is_coordinator=True)

    def write_file(number: int) -> list[WriteResult]:
        items, sources = zip(*plans[number], strict=True)
        with ThreadPoolExecutor(1) as reader:
            planner = _RowPlanner(sources, read_rows, progress, reader)
            return writer.write_data(SavePlan(list(items), storage_data=_StoragePrefix(f"__{number}_")), planner).wait()

    try:
        with ThreadPoolExecutor(WRITERS) as pool:
            results = list(pool.map(write_file, range(len(plans))))
    except RuntimeError as error:  # torch.save covers the disk's own error with one about its archive
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    items = [item for plan in plans for item, _ in plan]
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        name: _describe(items, name) for name in dict.fromkeys(item.index.fqn for item in items)
    }
    writer.finish(Metadata(state_dict_metadata=described, storage_meta=StorageMeta()), results)
    torch.save({}, folder / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist", 1, "torch", 1), str(folder))


def _items(shape: ModelShape, dtype: torch.dtype) -> Iterator[tuple[WriteItem, Source]]:
    """What is to be written, in order, and where each piece comes from."""
    layers = {"vision_model": shape.vision.num_layers, "language_model": shape.text.num_layers}
    for found in entries(shape).values():
        key, layer = split_layer(found.name)
        # The layer axis comes first in the stored tensor; tensors outside the towers have none.
        offset, lead, full = ([], [], []) if layer is None else ([layer], [1], [layers[key.split(".")[0]]])
        rows = max(1, CHUNK_BYTES // (torch.Size(found.shape[1:]).numel() * dtype.itemsize))
        for start in range(0, found.shape[0], rows):
            stop = min(start + rows, found.shape[0])
            chunk = ChunkStorageMetadata(
                torch.Size([*offset, start, *[0] * (len(found.shape) - 1)]), torch.Size([*lead, stop - start, *found.shape[1:]])
            )
            data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size([*full, *found.shape]))
            yield WriteItem(MetadataIndex(key, chunk.offsets), WriteItemType.SHARD, tensor_data=data), (found, start, stop)


def _describe(items: Sequence[WriteItem], name: str) -> TensorStorageMetadata:
    """The index's entry of one tensor."""
    pieces = [item.tensor_data for item in items if item.index.fqn == name and item.tensor_data is not None]
    return TensorStorageMetadata(pieces[0].properties, pieces[0].size, [piece.chunk for piece in pieces])


class _Writer(FileSystemWriter):
    """Leaves the folder's own path out of the index: a path is a class that no reader of an index should have to make."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class _RowPlanner(DefaultSavePlanner):
    """Gives the writer each piece when it is to be written; the next one is read meanwhile.

    The writer asks for the pieces in the order of its plan.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        read_rows: ReadRows,
        progress: Callable[[int], object],
        reader: ThreadPoolExecutor,
    ) -> None:
        super().__init__()
        self._coming = iter(sources)
        self._read_rows, self._progress, self._reader = read_rows, progress, reader
        self._next = self._read_ahead()

    def _read_ahead(self) -> Future[Tensor] | None:
        source = next(self._coming, None)
        return None if source is None else self._reader.submit(self._read_rows, *source)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The piece's values."""
        assert self._next is not None and write_item.tensor_data is not None
        rows = self._next.result()
        self._next = self._read_ahead()
        self._progress(rows.nbytes)
        return rows.reshape(write_item.tensor_data.chunk.sizes)
