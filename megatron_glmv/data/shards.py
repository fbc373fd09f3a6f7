"""Packed data sets on disk: tar shards of rows with their media still compressed, and an index that makes any row one read.

A plain tar is streamable, inspectable with any tool and readable by WebDataset; the numpy index beside it gives the random
access that an exact, shuffled, resumable order needs. The members of one row are adjacent and its media come last, so ranks
without a vision tower read only the head.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_glmv.data.index import COLUMNS, INDEX, REPACK, PackedIndex, ShardEntry, ShardError, read_index, write_index
from megatron_glmv.data.media import Clip, Media, Picture, describe, parse_media
from megatron_glmv.sequence.grid import PixelLimits
from megatron_glmv.sequence.packed import Document

BLOCK = 512
OPEN_SHARDS = 128
"""Shards that one reader keeps open; fewer than the usual limit of 1,024 descriptors a process."""


@dataclass(frozen=True)
class StoredRow:
    """One row as read back.

    Attributes:
        key: name of the row.
        documents: its samples, in order; tokens int32, loss weights float32.
        media: for each document, its pictures and videos.
        data: for each document, the bytes of its media; None when only the head was read.
    """

    key: str
    documents: tuple[Document, ...]
    media: tuple[tuple[Media, ...], ...]
    data: tuple[tuple[bytes, ...], ...] | None


class ShardWriter:
    """Writes a packed data set row by row; a shard is complete when its successor starts, the data set when `close` returns."""

    def __init__(
        self,
        folder: Path,
        *,
        length: int,
        align: int,
        vocab_size: int,
        image_token: int,
        pad_token: int,
        image_limits: PixelLimits,
        patch_size: int = 14,
        merge_size: int = 2,
        shard_bytes: int = 1 << 30,
        prefix: str = "",
        keep_shards: int = 0,
        keep_samples: int = 0,
    ) -> None:
        """Open `folder` for writing; an index and shards of this prefix that are already there are removed.

        Args:
            folder: created when missing.
            length: tokens of a row.
            align: document lengths count rounded up to multiples of this.
            vocab_size: every token id is below it.
            image_token: id of a merged visual token.
            pad_token: id that fills the end of a row.
            image_limits: bounds that pictures were measured with.
            patch_size: side of a patch in pixels.
            merge_size: patches a side of one token.
            shard_bytes: a shard that has reached this size is closed.
            prefix: starts the names of shards and rows, for writers that share a folder.
            keep_shards: complete shards of an interrupted writer with the same arguments, to go on behind.
            keep_samples: samples in them.

        Raises:
            ShardError: a shard to keep is missing or damaged.
        """
        self.folder = folder
        self._meta: dict[str, Any] = {
            "length": length, "align": align, "vocab_size": vocab_size,
            "tokens": {"image": image_token, "pad": pad_token},
            "image_limits": {"min_pixels": image_limits.min_pixels, "max_pixels": image_limits.max_pixels},
            "patch_size": patch_size, "merge_size": merge_size,
        }  # fmt: skip
        self._shard_bytes, self._prefix = shard_bytes, prefix
        self._tar: tarfile.TarFile | None = None
        self._rows: list[tuple[int, ...]] = []
        self._shards: list[ShardEntry] = []
        self.num_rows = self.num_samples = self.num_tokens = 0
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)
        for _ in range(keep_shards):
            self._keep_shard()
        self.num_samples = keep_samples
        kept = {name for shard in self._shards for name in (shard.file, shard.index)}
        for old in folder.glob(f"shard-{prefix}[0-9][0-9][0-9][0-9][0-9].*"):
            if old.name not in kept:
                old.unlink()

    @property
    def num_shards(self) -> int:
        """Complete shards."""
        return len(self._shards)

    def write(self, documents: Sequence[Document], media: Sequence[Sequence[Picture | Clip]]) -> None:
        """Append one row.

        Args:
            documents: samples of the row, visual placeholders expanded, not padded.
            media: for each document, its pictures and videos in token order; together they have as many frames as the document.

        Raises:
            ShardError: documents longer than the row, a token id outside the vocabulary, or media that do not match frames.
        """
        self._check(documents, media)
        if self._tar is not None and self._tar.offset >= self._shard_bytes:
            self._finish_shard()
        if self._tar is None:
            self._tar = tarfile.TarFile(self._path("tar"), "w", format=tarfile.USTAR_FORMAT)
        number = f"{self._prefix}{self.num_rows:08d}"
        listed: list[dict[str, Any]] = []
        members: list[tuple[str, bytes]] = []
        for document, own in zip(documents, media, strict=True):
            entries = []
            for item in own:
                extension = item.extension.lower() if re.fullmatch("[A-Za-z0-9]{1,8}", item.extension) else "bin"
                name = f"{number}.{len(members):03d}.{extension}"
                members.append((name, item.data))
                entries.append({"name": name, "size_bytes": len(item.data), "crc32": zlib.crc32(item.data),
                                "height": item.height, "width": item.width, **describe(item)})  # fmt: skip
            listed.append({"key": document.key, "length": len(document.tokens), "frames": document.frames, "media": entries})
        tokens = np.concatenate([document.tokens for document in documents]).astype(np.int32)
        weights = np.concatenate([document.loss_weights for document in documents]).astype(np.float32)
        start = self._tar.offset
        self._add(f"{number}.json", json.dumps({"key": f"row-{number}", "documents": listed}).encode())
        self._add(f"{number}.tokens.npy", _npy(tokens))
        self._add(f"{number}.weights.npy", _npy(weights))
        head = self._tar.offset - start
        for name, data in members:
            self._add(name, data)
        self._rows.append((start, head, self._tar.offset - start, *_measure(documents)))
        self.num_rows += 1
        self.num_samples += len(documents)
        self.num_tokens += len(tokens)

    def close(self, with_index: bool = True) -> PackedIndex:
        """Finish the last shard and, unless the index is joined with others later, write index.json.

        Raises:
            ShardError: no row was written.
        """
        if self._tar is not None:
            self._finish_shard()
        if not self.num_rows:
            raise ShardError(f"{self.folder}: no row to write; the input holds no usable sample")
        counts = {"num_rows": self.num_rows, "num_samples": self.num_samples, "num_tokens": self.num_tokens}
        index = PackedIndex.model_validate({**self._meta, **counts, "shards": tuple(self._shards)})
        if with_index:
            write_index(self.folder, index)
        return index

    def _check(self, documents: Sequence[Document], media: Sequence[Sequence[Picture | Clip]]) -> None:
        length, align, vocab_size = self._meta["length"], self._meta["align"], self._meta["vocab_size"]
        if not documents or len(documents) != len(media):
            raise ShardError(f"{self.folder}: a row needs documents, and pictures (possibly none) for each of them")
        for document, own in zip(documents, media, strict=True):
            shown = sum(len(item.frame_indices) // 2 if isinstance(item, Clip) else 1 for item in own)
            if shown != len(document.frames):
                raise ShardError(f"sample {document.key!r}: {shown} pictures but {len(document.frames)} frames")
            size = len(document.tokens)
            if not size or size != len(document.loss_weights):
                raise ShardError(f"sample {document.key!r}: {size} tokens but {len(document.loss_weights)} weights")
            if document.tokens.min() < 0 or document.tokens.max() >= vocab_size:
                raise ShardError(f"sample {document.key!r}: a token id outside the vocabulary of {vocab_size}")
        needed = sum(-(-len(document.tokens) // align) * align for document in documents)
        if needed > length:
            raise ShardError(f"row of {documents[0].key!r}: {needed} tokens (rounded up to {align}) in a row of {length}")

    def _add(self, name: str, data: bytes) -> None:
        assert self._tar is not None
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def _path(self, suffix: str) -> Path:
        return self.folder / f"shard-{self._prefix}{len(self._shards):05d}.{suffix}"

    def _finish_shard(self) -> None:
        assert self._tar is not None
        self._tar.close()
        self._tar = None
        index = self._path("rows.npy")
        partial = index.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, np.array(self._rows, dtype=np.int64))
        partial.rename(index)
        self._list_shard(len(self._rows))
        self._rows = []

    def _list_shard(self, num_rows: int) -> None:
        tar, index = self._path("tar"), self._path("rows.npy")
        self._shards.append(ShardEntry(file=tar.name, rows=num_rows, size_bytes=tar.stat().st_size, index=index.name))

    def _keep_shard(self) -> None:
        try:
            rows = np.load(self._path("rows.npy"))
            self._list_shard(len(rows))
        except (OSError, ValueError, EOFError) as error:
            raise ShardError(f"{self._path('tar')}: cannot go on behind this shard ({error}); remove {self.folder}") from None
        self.num_rows += len(rows)
        self.num_tokens += int(rows[:, COLUMNS.index("tokens")].sum())


class ShardReader:
    """Random access to the rows of one packed data set; reads may come from several threads at once."""

    def __init__(self, folder: Path) -> None:
        """Open and validate a data set: its index, and the presence and size of every shard.

        Raises:
            ShardError: no index, an index of another format, or a missing, truncated or foreign shard.
        """
        self.folder = folder
        self.index = read_index(folder)
        self._rows = [_open_rows(folder, shard) for shard in self.index.shards]
        self._ends = np.cumsum([shard.rows for shard in self.index.shards])
        if int(self._ends[-1]) != self.index.num_rows:
            raise ShardError(f"{folder / INDEX}: num_rows is {self.index.num_rows}, the shards hold {self._ends[-1]}; {REPACK}")
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.index.num_rows

    def measures(self, row: int) -> dict[str, int]:
        """The row's entry of rows.npy by column name: offsets in bytes, useful and trained tokens, patches, sums of squares."""
        shard, local = self._locate(row)
        return dict(zip(COLUMNS, self._rows[shard][local].tolist(), strict=True))

    def tables(self) -> Iterator[dict[str, npt.NDArray[np.int64]]]:
        """For each shard, the columns of rows.npy: what `measures` gives of one row, of all its rows."""
        for rows in self._rows:
            yield {name: rows[:, place] for place, name in enumerate(COLUMNS)}

    def read(self, row: int, media: bool = True) -> StoredRow:
        """Read one row with a single pread.

        Args:
            row: 0 .. len(self) - 1.
            media: also read the pictures; ranks without a vision tower do not.

        Raises:
            ShardError: the shard changed since it was opened, or the row's members are not what the index says.
        """
        shard, local = self._locate(row)
        offset, head, total = (int(value) for value in self._rows[shard][local, :3])
        size = total if media else head
        where = f"{self.folder / self.index.shards[shard].file}, row {row}"
        data = self._file(shard).read(offset, size)
        if len(data) != size:
            raise ShardError(f"{where}: only {len(data)} of {size} bytes are there; copy the shard again or {REPACK}")
        try:
            return _parse_row(dict(_members(data)), media)
        except (ValueError, KeyError, TypeError, tarfile.TarError) as error:
            raise ShardError(f"{where}: not a packed row ({error}); copy the shard again or {REPACK}") from None

    def close(self) -> None:
        """Close the shards that no read is using."""
        with self._lock:
            self._files.clear()

    def _locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.folder}")
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return shard, row - int(self._ends[shard]) + self.index.shards[shard].rows

    def _file(self, shard: int) -> _File:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = _File(self.folder / self.index.shards[shard].file)
            self._files.move_to_end(shard)
            while len(self._files) > OPEN_SHARDS:
                self._files.popitem(last=False)
            return file


class _File:
    """An open shard; it closes when the last reader drops it, so evicting one never pulls it from under another thread."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ShardError(f"{path}: cannot be read ({error.strerror}); copy the shard again or {REPACK}") from None

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def _open_rows(folder: Path, shard: ShardEntry) -> npt.NDArray[np.int64]:
    """The row index of one shard, memory-mapped: it may be far larger than what one run touches."""
    path = folder / shard.file
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ShardError(f"{path}: the shard cannot be found ({error.strerror}); copy it again or {REPACK}") from None
    if size != shard.size_bytes:
        raise ShardError(f"{path}: {size} bytes where the index says {shard.size_bytes}; copy the shard again or {REPACK}")
    path = folder / shard.index
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ShardError(f"{path}: cannot be read ({str(error) or 'it is empty'}); copy it again or {REPACK}") from None
    if rows.shape != (shard.rows, len(COLUMNS)) or rows.dtype != np.int64:
        raise ShardError(f"{path}: {rows.dtype} {rows.shape} where int64 {(shard.rows, len(COLUMNS))} is expected; {REPACK}")
    return rows


def _measure(documents: Sequence[Document]) -> tuple[int, int, int, int, int]:
    """What rows.npy holds of a row's contents, in the order of its columns."""
    lengths = [len(document.tokens) for document in documents]
    frames = [rows * columns for document in documents for rows, columns in document.frames]
    trained = sum(int(np.count_nonzero(document.loss_weights[1:])) for document in documents)
    return sum(lengths), sum(frames), trained, sum(n**2 for n in lengths), sum(n**2 for n in frames)


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and contents of the tar members in `data`, which starts at a header."""
    start = 0
    while start < len(data):
        header = tarfile.TarInfo.frombuf(data[start : start + BLOCK], "ascii", "strict")
        start += BLOCK
        yield header.name, data[start : start + header.size]
        start += -(-header.size // BLOCK) * BLOCK


def _parse_row(members: dict[str, bytes], with_media: bool) -> StoredRow:
    number = next(iter(members)).removesuffix(".json")
    tree = json.loads(members[f"{number}.json"])
    tokens = np.load(io.BytesIO(members[f"{number}.tokens.npy"]), allow_pickle=False)
    weights = np.load(io.BytesIO(members[f"{number}.weights.npy"]), allow_pickle=False)
    documents: list[Document] = []
    media: list[tuple[Media, ...]] = []
    start = 0
    for entry in tree["documents"]:
        end = start + entry["length"]
        frames = tuple((rows, columns) for rows, columns in entry["frames"])
        documents.append(Document(tokens[start:end], weights[start:end], frames, entry["key"]))
        media.append(tuple(parse_media(listed) for listed in entry["media"]))
        shown = sum(item.num_frames for item in media[-1])
        if len(frames) != shown:
            raise ValueError(f"sample {entry['key']!r} has {len(frames)} frames but {shown} pictures")
        start = end
    if start != len(tokens) or start != len(weights):
        raise ValueError(f"documents of {start} tokens, {len(tokens)} tokens and {len(weights)} weights")
    data = tuple(tuple(members[item.name] for item in own) for own in media) if with_media else None
    return StoredRow(tree["key"], tuple(documents), tuple(media), data)
