"""Writes packed data sets: tar shards of rows with their media still compressed, each with an index of its rows.

A plain tar is streamable, inspectable with any tool and readable by WebDataset; the numpy index beside it gives the random
access that an exact, shuffled, resumable order needs. The members of one row are adjacent and its media come last, so ranks
without a vision tower read only the head.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_glmv.data.index import COLUMNS, HEAD_MEMBERS, INDEX, PackedIndex, ShardEntry, ShardError, join_crc32, write_index
from megatron_glmv.data.media import Clip, Picture, describe
from megatron_glmv.run_folder.checkpoint_folder import sync
from megatron_glmv.sequence.grid import PixelLimits
from megatron_glmv.sequence.packed import Document


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

        The caller sees to it that no other process writes shards of this prefix: they would be removed under its hands.

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
        contents = (json.dumps({"key": f"row-{number}", "documents": listed}).encode(), _npy(tokens), _npy(weights))
        for suffix, data in zip(HEAD_MEMBERS, contents, strict=True):
            self._add(f"{number}.{suffix}", data)
        head = self._tar.offset - start
        for name, data in members:
            self._add(name, data)
        self._rows.append((start, head, self._tar.offset - start, join_crc32(contents), *_measure(documents)))
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
        for written in (self._path("tar"), partial):
            sync(written)
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


def _measure(documents: Sequence[Document]) -> tuple[int, int, int, int, int]:
    """What rows.npy holds of a row's contents, in the order of its columns."""
    lengths = [len(document.tokens) for document in documents]
    frames = [rows * columns for document in documents for rows, columns in document.frames]
    trained = sum(document.num_trained for document in documents)
    return sum(lengths), sum(frames), trained, sum(n**2 for n in lengths), sum(n**2 for n in frames)


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
