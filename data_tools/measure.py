"""The first half of packing: samples to tokens, grids and lengths, chunk by chunk, in as many processes as there are cores.

A chunk is a run of lines of one JSONL file. Its result is one .npz file that appears under its name when it is complete, so an
interrupted run continues behind the last finished chunk, and no process holds more than a few chunks in memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_glmv.data.chat import Chat
from megatron_glmv.data.sample import Sample, SampleError, parse_sample
from megatron_glmv.sequence.grid import Grid, image_grid
from megatron_glmv.sequence.packed import Document

CHUNK = 1024
"""Lines of a chunk."""


@dataclass(frozen=True)
class Chunk:
    """A run of lines of a JSONL file; `number` counts over all files."""

    number: int
    path: Path
    first_line: int
    start_byte: int
    num_lines: int


@dataclass(frozen=True)
class Measuring:
    """What the result of measuring depends on, besides the samples.

    Attributes:
        processor: folder with tokenizer, template and image settings.
        decode: decode every picture fully, not only its header.
    """

    processor: Path
    decode: bool = True


@dataclass(frozen=True)
class MediaFile:
    """A picture that a sample names; height and width in pixels as decoded, EXIF orientation not applied."""

    path: str
    height: int
    width: int


@dataclass(frozen=True)
class Measured:
    """A sample ready to be packed."""

    document: Document
    media: tuple[MediaFile, ...]

    @property
    def num_patches(self) -> int:
        """Patches of all its pictures."""
        return sum(rows * columns for rows, columns in self.document.frames)


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be packed."""

    key: str
    reason: str
    detail: str


def list_chunks(paths: Sequence[Path], size: int = CHUNK) -> list[Chunk]:
    """Cut JSONL files into chunks of `size` lines.

    Raises:
        OSError: a file cannot be read.
    """
    chunks: list[Chunk] = []
    for path in paths:
        start = end = first = lines = 0
        with path.open("rb") as file:
            for lines, line in enumerate(file, start=1):
                end += len(line)
                if lines - first == size:
                    chunks.append(Chunk(len(chunks), path, first, start, size))
                    start, first = end, lines
        if lines > first:
            chunks.append(Chunk(len(chunks), path, first, start, lines - first))
    return chunks


def measure_chunk(chunk: Chunk, settings: Measuring, folder: Path) -> list[Skipped]:
    """Measure the samples of a chunk and save the result in `folder`; nothing is computed when it is already there.

    Returns:
        The samples that cannot be packed.
    """
    path = _result_path(folder, chunk)
    if not path.exists():
        chat = _load_chat(settings.processor)
        measured, skipped = [], []
        with chunk.path.open("rb") as file:
            file.seek(chunk.start_byte)
            for number in range(chunk.first_line + 1, chunk.first_line + chunk.num_lines + 1):
                line = file.readline()
                if not line.strip():
                    continue
                try:
                    sample = parse_sample(line, f"{chunk.path.name}:{number}", chunk.path.parent)
                    measured.append(measure_sample(sample, chat, settings.decode))
                except SampleError as error:
                    skipped.append(Skipped(error.key, error.reason, error.detail))
        _save(path, measured, skipped)
    with np.load(path) as arrays:
        return [Skipped(**entry) for entry in json.loads(arrays["skipped"].tobytes())]


def measure_sample(sample: Sample, chat: Chat, decode: bool = True) -> Measured:
    """Tokens, weights and grids of one sample.

    Raises:
        SampleError: a picture that is missing, does not decode or is too narrow, or a conversation that cannot be encoded.
    """
    media, grids = [], []
    for item in sample.media():
        if item.kind != "image":
            raise SampleError(sample.key, "videos cannot be packed yet", item.value)
        file = measure_picture(sample, item.value, decode)
        media.append(file)
        grids.append(_grid(sample, file, chat))
    return Measured(chat.encode(sample, grids), tuple(media))


def measure_picture(sample: Sample, name: str, decode: bool) -> MediaFile:
    """The size of a picture that a sample names, after checking that Pillow reads it.

    Raises:
        SampleError: the file is missing or does not decode.
    """
    path = sample.folder / name
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if decode:
                picture.load()
    except FileNotFoundError:
        raise SampleError(sample.key, "a picture is missing", str(path)) from None
    except Exception as error:  # noqa: BLE001  (Pillow's decoders raise whatever their parser raises on broken bytes)
        raise SampleError(sample.key, "a picture does not decode", f"{path} ({error})") from None
    return MediaFile(str(path), height, width)


def load_measured(chunk: Chunk, folder: Path) -> list[Measured]:
    """The usable samples of a chunk that was measured before."""
    with np.load(_result_path(folder, chunk)) as arrays:
        tokens, weights = arrays["tokens"], arrays["weights"]
        entries = json.loads(arrays["documents"].tobytes())
    measured, start = [], 0
    for entry in entries:
        end = start + entry["length"]
        frames = tuple((rows, columns) for rows, columns in entry["frames"])
        document = Document(tokens[start:end], weights[start:end], frames, entry["key"])
        measured.append(Measured(document, tuple(MediaFile(**file) for file in entry["media"])))
        start = end
    return measured


def _save(path: Path, measured: Sequence[Measured], skipped: Sequence[Skipped]) -> None:
    entries = [{"key": sample.document.key, "length": len(sample.document.tokens), "frames": sample.document.frames,
                "media": [asdict(file) for file in sample.media]} for sample in measured]  # fmt: skip
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(
            file,
            tokens=np.concatenate([np.empty(0, np.int32), *(sample.document.tokens for sample in measured)]),
            weights=np.concatenate([np.empty(0, np.float32), *(sample.document.loss_weights for sample in measured)]),
            documents=_json_bytes(entries),
            skipped=_json_bytes([asdict(entry) for entry in skipped]),
        )
    partial.rename(path)


def _json_bytes(tree: Any) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(tree).encode(), dtype=np.uint8)


def _result_path(folder: Path, chunk: Chunk) -> Path:
    return folder / f"{chunk.number:06d}.npz"


def _grid(sample: Sample, file: MediaFile, chat: Chat) -> Grid:
    try:
        return image_grid(file.height, file.width, chat.image.limits, chat.image.patch_size)
    except ValueError as error:
        raise SampleError(sample.key, "a picture is too narrow", f"{file.path} ({error})") from None


@lru_cache(maxsize=1)
def _load_chat(folder: Path) -> Chat:
    return Chat(folder)
