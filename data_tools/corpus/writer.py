"""Writing a chunk's samples: JSONL and a media folder, WebDataset tars, or Parquet.

Every file belongs to one chunk and is named by its number, so that a chunk can be written again and no two parts of a job write
one file. Names are made here, from numbers; no name that a sample brought is ever used.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.corpus.checks import Loaded
from data_tools.corpus.formats import KEY_KEYS

Form = Literal["jsonl", "webdataset", "parquet"]
FORMS: tuple[Form, ...] = ("jsonl", "webdataset", "parquet")
GROUP_ROWS = 256
GROUP_BYTES = 64 << 20
"""A row group of a Parquet file ends at either."""

_MEDIA = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
_CONTENT = pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())]))
SCHEMA = pa.schema(
    [("id", pa.string()), ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", _CONTENT)]))),
     ("images", _MEDIA), ("videos", _MEDIA), ("extra", pa.string())]
)  # fmt: skip


class ChunkWriter(Protocol):
    """Writes the samples of one chunk."""

    def write(self, loaded: Loaded) -> None:
        """Append a sample."""

    def close(self) -> None:
        """Finish the files."""


def open_writer(form: Form, folder: Path, number: int, shard_bytes: int) -> ChunkWriter:
    """A writer for a chunk; what an earlier attempt left of this chunk is removed.

    Args:
        form: of the files.
        folder: they lie in.
        number: of the chunk.
        shard_bytes: a tar or Parquet file that has reached this size is closed.
    """
    for old in (folder / f"samples-{number:06d}.jsonl", *folder.glob(f"shard-{number:06d}-*.tar"),
                *folder.glob(f"part-{number:06d}-*.parquet")):  # fmt: skip
        old.unlink(missing_ok=True)
    shutil.rmtree(folder / "media" / f"{number:06d}", ignore_errors=True)
    if form == "jsonl":
        return _JsonlWriter(folder, number)
    if form == "webdataset":
        return _TarWriter(folder, number, shard_bytes)
    return _ParquetWriter(folder, number, shard_bytes)


class _JsonlWriter:
    """A file of lines, and media beside it in a folder of the chunk's."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number
        self._file: BinaryIO | None = None

    def write(self, loaded: Loaded) -> None:
        names = []
        media = Path("media") / f"{self._number:06d}"
        for ordinal, medium in enumerate(loaded.media):
            (self._folder / media).mkdir(parents=True, exist_ok=True)
            name = media / f"{loaded.position:06d}-{ordinal}.{medium.extension}"
            (self._folder / name).write_bytes(medium.data)
            names.append(name.as_posix())
        if self._file is None:
            self._file = (self._folder / f"samples-{self._number:06d}.jsonl").open("wb")
        self._file.write(_encode(sample_tree(loaded, names)) + b"\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _TarWriter:
    """Tars whose samples are a JSON and its media, under one stem."""

    def __init__(self, folder: Path, number: int, shard_bytes: int) -> None:
        self._folder, self._number, self._shard_bytes = folder, number, shard_bytes
        self._tar: tarfile.TarFile | None = None
        self._shards = 0

    def write(self, loaded: Loaded) -> None:
        if self._tar is not None and self._tar.offset >= self._shard_bytes:
            self.close()
        if self._tar is None:
            path = self._folder / f"shard-{self._number:06d}-{self._shards:03d}.tar"
            self._tar = tarfile.TarFile(path, "w", format=tarfile.USTAR_FORMAT)
            self._shards += 1
        stem = f"{self._number:06d}-{loaded.position:06d}"
        names = [f"{ordinal}.{medium.extension}" for ordinal, medium in enumerate(loaded.media)]
        self._add(f"{stem}.json", _encode(sample_tree(loaded, names)))
        for name, medium in zip(names, loaded.media, strict=True):
            self._add(f"{stem}.{name}", medium.data)
        self._tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def _add(self, name: str, data: bytes) -> None:
        assert self._tar is not None
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))


class _ParquetWriter:
    """Parquet files with the bytes of the media in them, a row group at a time."""

    def __init__(self, folder: Path, number: int, shard_bytes: int) -> None:
        self._folder, self._number, self._shard_bytes = folder, number, shard_bytes
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[dict[str, Any]] = []
        self._waiting_bytes = self._written = self._shards = 0

    def write(self, loaded: Loaded) -> None:
        tree = sample_tree(loaded, [""] * len(loaded.media))
        row: dict[str, Any] = {"id": tree.pop("id"), "images": [], "videos": []}
        row["messages"] = [
            {"role": turn["role"], "content": [{"type": item["type"], "text": item.get("text")} for item in _items(turn)]}
            for turn in tree.pop("messages")
        ]
        for ordinal, medium in enumerate(loaded.media):
            name = f"{self._number:06d}-{loaded.position:06d}-{ordinal}.{medium.extension}"
            row[f"{medium.kind}s"].append({"bytes": medium.data, "path": name})
        row["extra"] = _encode(tree).decode() if tree else None
        self._rows.append(row)
        self._waiting_bytes += sum(len(medium.data) for medium in loaded.media) + 1024
        if len(self._rows) >= GROUP_ROWS or self._waiting_bytes >= min(GROUP_BYTES, self._shard_bytes):
            self._flush()

    def close(self) -> None:
        self._flush()
        self._finish_shard()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            path = self._folder / f"part-{self._number:06d}-{self._shards:03d}.parquet"
            # Pictures are compressed already.
            self._writer = pq.ParquetWriter(path, SCHEMA, compression="none", use_dictionary=False)
            self._shards += 1
        self._writer.write_table(pa.Table.from_pylist(self._rows, SCHEMA))
        self._written += self._waiting_bytes
        self._rows, self._waiting_bytes = [], 0
        if self._written >= self._shard_bytes:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer, self._written = None, 0


def sample_tree(loaded: Loaded, names: list[str]) -> dict[str, Any]:
    """A sample in our form, as JSON; `names` are what its media are called."""
    waiting = iter(names)
    turns: list[dict[str, Any]] = []
    for message in loaded.record.sample.messages:
        content: Any = [
            {"type": item.kind, item.kind: item.value if item.kind == "text" else next(waiting)} for item in message.content
        ]
        if len(content) == 1 and content[0]["type"] == "text":
            content = content[0]["text"]
        turns.append({"role": message.role, "content": content})
    extra = {str(name): value for name, value in loaded.record.extra.items() if name not in KEY_KEYS}
    return {"id": loaded.record.sample.key, "messages": turns} | _plain(extra)


def _items(turn: dict[str, Any]) -> list[dict[str, Any]]:
    content = turn["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _plain(value: Any) -> Any:
    """What JSON can say of a value: no bytes, no NaN, no lone surrogates."""
    if isinstance(value, Mapping):
        return {_plain(str(name)): _plain(item) for name, item in value.items() if not isinstance(item, bytes)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bool | int) or value is None:
        return value
    return (value if isinstance(value, str) else str(value)).encode("utf-8", "replace").decode()


def _encode(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, ensure_ascii=False, allow_nan=False).encode()
