"""The first half of packing: samples to tokens, grids and lengths, chunk by chunk, in as many processes as there are cores.

A chunk's result is a few arrays on disk. Packing reads the small ones (lengths, patches) of very many samples at a time, and
the tokens of a sample only when its row is written, so memory stays bounded whatever the size of the corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from data_tools.corpus.faults import Dropped, Fault
from data_tools.corpus.job import Tally, chunk_path
from data_tools.corpus.media import MediaRef, Place, Record
from data_tools.corpus.reader import Chunk
from data_tools.headers import PackedMedium, plan_medium
from megatron_glmv.data.chat import Chat, Thinking
from megatron_glmv.data.sample import Sample, SampleError
from megatron_glmv.data.videos import VideoPlan
from megatron_glmv.sequence.grid import Grid
from megatron_glmv.sequence.packed import Document

BATCH = 256
"""Samples tokenised together."""
SUFFIX = "measured.npz"

_Planned = tuple[Record, list[PackedMedium], list[Grid | VideoPlan]]


@dataclass(frozen=True)
class Measured:
    """A sample ready to be packed: its document, its media, and where it was read."""

    document: Document
    media: tuple[PackedMedium, ...]
    source: str


@dataclass(frozen=True)
class Measuring:
    """Measures chunks; what the result depends on, besides the samples.

    Attributes:
        processor: folder with tokenizer, template and image settings.
        decode: decode every picture fully, not only its header.
        thinking: what becomes of think blocks.
    """

    processor: Path
    decode: bool = False
    thinking: Thinking = field(default_factory=Thinking)

    def __call__(self, chunk: Chunk, folder: Path) -> Tally:
        """Measure the samples of a chunk and save the result in `folder`."""
        chat = _load_chat(self.processor, self.thinking)
        dropped: list[Dropped] = []
        with chunk_path(folder, chunk.number, "media.bin").open("wb") as spill:
            batches = list(self._measure(chunk, chat, spill, dropped))
        found = [measured for batch in batches for measured in batch]
        _save(folder, chunk.number, found)
        lines = "".join(entry.line() + "\n" for entry in dropped)
        chunk_path(folder, chunk.number, "dropped.jsonl").write_text(lines, encoding="utf-8")
        reasons = dict(Counter(entry.reason for entry in dropped))
        return Tally(len(found) + len(dropped), len(found), reasons, sum(entry.is_fault for entry in dropped))

    def _measure(self, chunk: Chunk, chat: Chat, spill: BinaryIO, dropped: list[Dropped]) -> Iterator[list[Measured]]:
        waiting: list[_Planned] = []
        for record in chunk.read():
            if isinstance(record, Dropped):
                dropped.append(record)
                continue
            try:
                waiting.append(self._plan(record, chat, spill))
            except Fault as fault:
                dropped.append(fault.dropped(record.source, record.sample.key))
            if len(waiting) == BATCH:
                yield _encode(waiting, chat, dropped)
                waiting = []
        yield _encode(waiting, chat, dropped)

    def _plan(self, record: Record, chat: Chat, spill: BinaryIO) -> _Planned:
        media, plans = [], []
        for ref in record.media:
            medium, plan = plan_medium(ref, chat, self.decode)
            media.append(medium)
            plans.append(plan)
        # Bytes that came inside a line or row are kept here: reading them again would read the whole line or row group.
        media = [_spill(medium, ref, spill) for medium, ref in zip(media, record.media, strict=True)]
        return record, media, plans


def measure_sample(sample: Sample, media: Sequence[MediaRef], chat: Chat) -> Measured:
    """Tokens, weights, grids and frames of one sample.

    Raises:
        Fault: a picture or video that cannot be used.
        SampleError: a conversation that cannot be encoded.
    """
    planned = [plan_medium(ref, chat) for ref in media]
    document = chat.encode(sample, [plan for _, plan in planned])
    return Measured(document, tuple(medium for medium, _ in planned), sample.key)


class MeasuredChunk:
    """The result of a chunk: small arrays in memory; tokens, weights and media are read sample by sample.

    Attributes:
        lengths: [n] tokens of each sample.
        trained: [n] those of them that are trained.
        patches: [n] patches of all its frames.
        squared_patches: [n] sum over its frames of the square of the frame's patches.
        digests: [n, 2] of its key, and of its key and contents.
    """

    def __init__(self, folder: Path, number: int) -> None:
        with np.load(chunk_path(folder, number, SUFFIX)) as arrays:
            self.lengths, self.trained, self.patches = arrays["lengths"], arrays["trained"], arrays["patches"]
            self.squared_patches, self.digests = arrays["squared_patches"], arrays["digests"]
            self._ends = arrays["ends"]
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._folder, self._number = folder, number

    def __len__(self) -> int:
        return len(self.lengths)

    def entry(self, index: int) -> dict[str, Any]:
        """Key, source, frames and media of a sample as saved."""
        start = int(self._ends[index - 1]) if index else 0
        return json.loads(self._read("entries.bin", np.uint8, start, int(self._ends[index])).tobytes())

    def sample(self, index: int) -> Measured:
        """A sample; its tokens are read now."""
        entry = self.entry(index)
        start, end = int(self._starts[index]), int(self._starts[index] + self.lengths[index])
        tokens = self._read("tokens.bin", np.int32, start, end)
        weights = self._read("weights.bin", np.float32, start, end)
        frames = tuple((rows, columns) for rows, columns in entry["frames"])
        media = tuple(_read_medium(listed, self._folder, self._number) for listed in entry["media"])
        return Measured(Document(tokens, weights, frames, entry["key"]), media, entry["source"])

    def _read(self, name: str, dtype: type[np.generic], start: int, end: int) -> npt.NDArray[Any]:
        """Read, not mapped: what rows have touched would stay in memory as long as the window."""
        size = np.dtype(dtype).itemsize
        with chunk_path(self._folder, self._number, name).open("rb", buffering=0) as file:
            file.seek(start * size)
            return np.frombuffer(file.read((end - start) * size), dtype=dtype)


def _encode(planned: Sequence[_Planned], chat: Chat, dropped: list[Dropped]) -> list[Measured]:
    documents = chat.encode_all([(record.sample, plans) for record, _, plans in planned])
    measured = []
    for (record, media, _), document in zip(planned, documents, strict=True):
        if isinstance(document, SampleError):
            fault = Fault("sample_invalid", f"{document.reason} {document.detail}".strip(), document.key)
            dropped.append(fault.dropped(record.source))
        else:
            measured.append(Measured(document, tuple(media), record.source))
    return measured


def _spill(medium: PackedMedium, ref: MediaRef, spill: BinaryIO) -> PackedMedium:
    if ref.data is None:
        return medium
    place = Place("range", "", spill.tell(), len(ref.data))
    spill.write(ref.data)
    return replace(medium, place=place)


def _read_medium(listed: dict[str, Any], folder: Path, number: int) -> PackedMedium:
    place = Place(**listed["place"])
    if not place.path:
        place = replace(place, path=str(chunk_path(folder, number, "media.bin")))
    return PackedMedium(**listed | {"place": place, "frame_indices": tuple(listed["frame_indices"])})


def _save(folder: Path, number: int, measured: Sequence[Measured]) -> None:
    documents = [sample.document for sample in measured]
    patches = [[rows * columns for rows, columns in document.frames] for document in documents]
    entries = [
        json.dumps({"key": sample.document.key, "source": sample.source, "frames": sample.document.frames,
                    "media": [asdict(medium) for medium in sample.media]}).encode()
        for sample in measured
    ]  # fmt: skip
    _join(np.int32, [document.tokens for document in documents]).tofile(chunk_path(folder, number, "tokens.bin"))
    _join(np.float32, [document.loss_weights for document in documents]).tofile(chunk_path(folder, number, "weights.bin"))
    chunk_path(folder, number, "entries.bin").write_bytes(b"".join(entries))
    np.savez(
        chunk_path(folder, number, SUFFIX),
        lengths=np.array([len(document.tokens) for document in documents], dtype=np.int64),
        trained=np.array([document.num_trained for document in documents], dtype=np.int64),
        patches=np.array([sum(own) for own in patches], dtype=np.int64),
        squared_patches=np.array([sum(count * count for count in own) for own in patches], dtype=np.int64),
        digests=np.array([_digest(sample) for sample in measured], dtype=np.uint64).reshape(-1, 2),
        ends=np.cumsum([len(entry) for entry in entries], dtype=np.int64),
    )


def _join(dtype: type[np.generic], parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts])


def _digest(sample: Measured) -> tuple[int, int]:
    key = hashlib.blake2b(sample.document.key.encode("utf-8", "backslashreplace"), digest_size=8)
    whole = key.copy()
    whole.update(np.ascontiguousarray(sample.document.tokens).tobytes())
    for medium in sample.media:
        whole.update(f"{medium.name} {medium.place.path} {medium.place.size_bytes}".encode("utf-8", "backslashreplace"))
    return int.from_bytes(key.digest(), "little"), int.from_bytes(whole.digest(), "little")


@lru_cache(maxsize=1)
def _load_chat(folder: Path, thinking: Thinking) -> Chat:
    # There is a process for every core already.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return Chat(folder, thinking)
