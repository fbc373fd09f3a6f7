"""The weights of a Hugging Face folder: read in slices, written one tensor at a time.

Writing does not collect a shard in memory as the safetensors package does: all shapes are known beforehand, so the header goes
first and every tensor is written to its place when it comes. Peak memory is a few tensors, whatever the size of a shard.

Source: the safetensors format (8 bytes little-endian header length, JSON header padded with spaces, tensor bytes); transformers
5.23.0, modeling_utils.py (`model.safetensors.index.json`, metadata `format: pt`).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import RawIOBase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_glmv.config.weight_map import MappingError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
WRITERS = 2
"""Tensors that are written at once, each to its own place in the file."""
WRITE_BYTES = 1 << 26
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class HfWeights:
    """The tensors of a Hugging Face folder, read lazily and in slices.

    A file is mapped into memory only while it is read, so that the pages read do not count as this process's memory.

    Attributes:
        folder: where they are.
        files: the safetensors files' names.
        shapes: name -> shape of every tensor in the files.
        dtypes: name -> dtype.

    Raises:
        MappingError: no weights in the folder, a shard that the index names is missing or not a safetensors file, or an index
            that does not agree with the shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX_FILE
        if index.is_file():
            try:
                listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
                raise MappingError(f"{index}: not a weight index") from None
        elif (folder / SINGLE_FILE).is_file():
            listed = {}
        else:
            raise MappingError(
                f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}; weights are read from safetensors only, never from pickles"
            )
        self.files = sorted(set(listed.values()) or {SINGLE_FILE})
        self._file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in self.files:
            self._read_header(file)
        if listed and (wrong := sorted(set(listed.items()) ^ set(self._file_of.items()))):
            raise MappingError(f"{index}: does not agree with {wrong[0][1]} about {wrong[0][0]}")

    def _read_header(self, file: str) -> None:
        with _open(self.folder / file) as handle:
            for name in handle.keys():  # noqa: SIM118  (not a mapping)
                if self._file_of.setdefault(name, file) != file:
                    raise MappingError(f"{self.folder}: {name} is in both {self._file_of[name]} and {file}")
                part = handle.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    known = ", ".join(_DTYPES)
                    raise MappingError(f"{self.folder / file}: {name} has dtype {part.get_dtype()}; weights are one of {known}")
                self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), _DTYPES[part.get_dtype()]

    def read(self, name: str, start: int, stop: int, columns: tuple[int, int] | None) -> Tensor:
        """Rows `start` to `stop` of one tensor, and the columns (of axis 1) if given; nothing else is read."""
        with _open(self.folder / self._file_of[name]) as handle:
            rows = handle.get_slice(name)
            return rows[start:stop] if columns is None else rows[start:stop, columns[0] : columns[1]]


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise MappingError(f"{path}: the shard is missing; fetch the folder again") from None
    except SafetensorError as error:
        raise MappingError(f"{path}: not a complete safetensors file ({error}); fetch it again") from None


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write safetensors shards of at most `max_shard_bytes` and, with more than one, their index.

    Args:
        folder: an existing folder.
        shapes: every tensor in the order in which it will come.
        dtypes: of every tensor.
        tensors: (name, tensor) in the order of `shapes`.
        max_shard_bytes: tensors are never split, so a larger one gets a shard of its own.

    Raises:
        MappingError: `tensors` does not bring exactly `shapes`, in order.
    """
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    shards: list[dict[str, int]] = [{}]
    for name, size in sizes.items():
        if shards[-1] and sum(shards[-1].values()) + size > max_shard_bytes:
            shards.append({})
        shards[-1][name] = size
    total = len(shards)
    files = [SINGLE_FILE] if total == 1 else [f"model-{n:05}-of-{total:05}.safetensors" for n in range(1, total + 1)]
    coming = iter(tensors)
    with ThreadPoolExecutor(WRITERS) as pool:
        for file, shard in zip(files, shards, strict=True):
            with (folder / file).open("wb", buffering=0) as stream:
                offset = _write_header(stream, shard, shapes, dtypes)
                pending: deque[Future[None]] = deque()
                for name, size in shard.items():
                    data = _bytes_of(name, next(coming, None), shapes[name], dtypes[name])
                    if len(pending) == WRITERS:
                        pending.popleft().result()
                    pending.append(pool.submit(_write_at, stream.fileno(), data, offset))
                    offset += size
                for write in pending:
                    write.result()
    if (extra := next(coming, None)) is not None:
        raise MappingError(f"{folder}: the tensor {extra[0]} was not announced")
    if total > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_header(
    stream: RawIOBase, shard: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
) -> int:
    """Write a shard's header; returns where its first tensor begins."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, size in shard.items():
        header[name] = {"dtype": DTYPE_NAMES[dtypes[name]], "shape": shapes[name], "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _write_at(stream.fileno(), memoryview(struct.pack("<Q", len(text)) + text), 0)
    return 8 + len(text)


def _bytes_of(name: str, item: tuple[str, Tensor] | None, shape: tuple[int, ...], dtype: torch.dtype) -> memoryview:
    if item is None or item[0] != name:
        raise MappingError(f"{name} was to be written next, not {'the end' if item is None else item[0]}")
    tensor = item[1]
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise MappingError(f"{name}: {list(tensor.shape)} {tensor.dtype} was announced as {list(shape)} {dtype}")
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _write_at(file: int, data: memoryview, offset: int) -> None:
    """Write all of `data`; one call writes 2 GB at most."""
    while data:
        written = os.pwrite(file, data[:WRITE_BYTES], offset)
        data, offset = data[written:], offset + written
