"""Reads packed data sets: any row is one read, through the index of rows beside its tar shard.

Ranks without a vision tower read only the head of a row, which its media follow. `shard_writer` says why shards look so.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_glmv.data.index import COLUMNS, HEAD_MEMBERS, INDEX, REPACK, ShardEntry, ShardError, join_crc32, read_index
from megatron_glmv.data.media import Media, parse_media
from megatron_glmv.sequence.packed import Document

BLOCK = 512
OPEN_SHARDS = 128
"""Shards that one reader keeps open; fewer than the usual limit of 1,024 descriptors a process."""
OPEN_TABLES = 4096
"""Row tables that one reader keeps mapped; Linux gives a process 65,530 maps, and a billion samples have as many shards."""
CHECKED_SHARDS = 1024
"""Shards whose files are looked at when a data set is opened, at even distances where there are more. Every rank does it: a
file system that is asked for all files of a large data set by a thousand ranks at once does nothing else for minutes."""


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


class ShardReader:
    """Random access to the rows of one packed data set; reads may come from several threads at once."""

    def __init__(self, folder: Path) -> None:
        """Open and validate a data set: its index, and the presence and size of at most `CHECKED_SHARDS` shards.

        The others are checked when a row of theirs is first read, so that opening costs the same for any number of them.

        Raises:
            ShardError: no index, an index of another format, or a missing, truncated or foreign shard.
        """
        self.folder = folder
        self.index = read_index(folder)
        self._tables: OrderedDict[int, npt.NDArray[np.int64]] = OrderedDict()
        self._table_lock = threading.Lock()
        self._checked: set[int] = set()
        for shard in range(0, len(self.index.shards), -(-len(self.index.shards) // CHECKED_SHARDS)):
            _check_size(folder, self.index.shards[shard])
            self._table(shard)
            self._checked.add(shard)
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
        return dict(zip(COLUMNS, self._table(shard)[local].tolist(), strict=True))

    def tables(self) -> Iterator[dict[str, npt.NDArray[np.int64]]]:
        """For each shard, the columns of rows.npy: what `measures` gives of one row, of all its rows."""
        for shard in range(len(self.index.shards)):
            rows = self._table(shard)
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
        offset, head, total, crc32 = (int(value) for value in self._table(shard)[local, :4])
        size = total if media else head
        where = f"{self.folder / self.index.shards[shard].file}, row {row}"
        data = self._file(shard).read(offset, size)
        if len(data) != size:
            raise ShardError(f"{where}: only {len(data)} of {size} bytes are there; copy the shard again or {REPACK}")
        try:
            return _parse_row(dict(_members(data)), crc32, media)
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

    def _table(self, shard: int) -> npt.NDArray[np.int64]:
        """One shard's rows.npy, mapped.

        Raises:
            ShardError: it is missing or foreign.
        """
        with self._table_lock:
            table = self._tables.get(shard)
            if table is None:
                table = self._tables[shard] = _open_rows(self.folder, self.index.shards[shard])
            self._tables.move_to_end(shard)
            while len(self._tables) > OPEN_TABLES:
                self._tables.popitem(last=False)
            return table

    def _file(self, shard: int) -> _File:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                if shard not in self._checked:
                    _check_size(self.folder, self.index.shards[shard])
                    self._checked.add(shard)
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
        """`size` bytes from `offset` on; fewer where the file ends."""
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


def _check_size(folder: Path, shard: ShardEntry) -> None:
    """Refuse a shard that is missing or truncated."""
    path = folder / shard.file
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ShardError(f"{path}: the shard cannot be found ({error.strerror}); copy it again or {REPACK}") from None
    if size != shard.size_bytes:
        raise ShardError(f"{path}: {size} bytes where the index says {shard.size_bytes}; copy the shard again or {REPACK}")


def _open_rows(folder: Path, shard: ShardEntry) -> npt.NDArray[np.int64]:
    """The row index of one shard, memory-mapped: it may be far larger than what one run touches."""
    path = folder / shard.index
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ShardError(f"{path}: cannot be read ({str(error) or 'it is empty'}); copy it again or {REPACK}") from None
    if rows.shape != (shard.rows, len(COLUMNS)) or rows.dtype != np.int64:
        raise ShardError(f"{path}: {rows.dtype} {rows.shape} where int64 {(shard.rows, len(COLUMNS))} is expected; {REPACK}")
    return rows


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and contents of the tar members in `data`, which starts at a header."""
    start = 0
    while start < len(data):
        header = tarfile.TarInfo.frombuf(data[start : start + BLOCK], "ascii", "strict")
        start += BLOCK
        yield header.name, data[start : start + header.size]
        start += -(-header.size // BLOCK) * BLOCK


def _parse_row(members: dict[str, bytes], crc32: int, with_media: bool) -> StoredRow:
    number = next(iter(members)).removesuffix(".json")
    contents = [members[f"{number}.{suffix}"] for suffix in HEAD_MEMBERS]
    if join_crc32(contents) != crc32:
        raise ValueError("its bytes are not those written")
    tree = json.loads(contents[0])
    tokens, weights = (np.load(io.BytesIO(content), allow_pickle=False) for content in contents[1:])
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
