"""The second half of packing: from measured samples to rows, and from rows to shards, window by window.

A window is so many samples that packing them together fills rows as well as packing all at once would, and so few that their
lengths fit in memory. Rows that stay half empty at the end of a window are taken apart and packed with the next one.

An interrupted run goes on behind the last complete shard: which rows come next is computed again, and is the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_tools.corpus.faults import Dropped, Fault
from data_tools.corpus.job import Tally, chunk_path, write_json
from data_tools.corpus.media import MediaRef, read_bytes
from data_tools.headers import PackedMedium
from data_tools.measure import MeasuredChunk
from megatron_glmv.config.model import ModelConfig
from megatron_glmv.data.chat import Chat
from megatron_glmv.data.media import Clip, Picture
from megatron_glmv.data.packing import pack_lengths
from megatron_glmv.data.picture_files import PictureError, convert_picture
from megatron_glmv.data.sample import SampleError
from megatron_glmv.data.shard_writer import ShardWriter
from megatron_glmv.sequence.cost import cost_model
from megatron_glmv.sequence.packed import Document

WINDOW = 1 << 18
"""Samples packed together."""
CARRIED_BELOW = 0.97
"""Rows less full than this are taken apart again and packed with the next window."""
PROGRESS = "progress.json"

Reference = tuple[int, int]
"""Number of a chunk, and which of its samples."""


@dataclass(frozen=True)
class RowSettings:
    """What rows are packed for.

    Attributes:
        processor: folder with tokenizer, template and image settings.
        length: tokens of a row.
        align: samples take their length rounded up to a multiple of this.
        max_patches: most patches in a row, None for no limit.
        seed: decides which short samples share a row, and the order of the rows.
        model: preset of the model whose cost rows should share alike.
        skip_long: leave out samples that exceed a row instead of stopping.
        shard_mib: size at which a shard is closed.
    """

    processor: Path
    length: int
    align: int = 8
    max_patches: int | None = None
    seed: int = 0
    model: str = "glm-4.1v-9b"
    skip_long: bool = False
    shard_mib: int = 1024


@dataclass(frozen=True)
class Share:
    """The chunks whose samples one part packs into rows of its own; `prefix` starts the names of its shards."""

    number: int
    chunks: tuple[int, ...]
    prefix: str = ""


@dataclass(frozen=True)
class RowPacking:
    """Packs the measured samples of a share into shards in `target`.

    Attributes:
        settings: of the rows.
        measured: folder of the measured chunks.
        target: folder of the data set.
    """

    settings: RowSettings
    measured: Path
    target: Path

    def __call__(self, share: Share, folder: Path) -> Tally:
        """Write the shards of a share, and beside the given folder what was left out and what its rows cost."""
        masks, dropped = select_samples(share.chunks, self.measured, self.settings)
        progress_path = chunk_path(folder, share.number, PROGRESS)
        progress = _Progress(**json.loads(progress_path.read_text())) if progress_path.exists() else _Progress()
        late = [Dropped(**entry) for entry in progress.dropped]
        writer = self._open(share, progress)
        costs: list[float] = []
        with tqdm(total=int(sum(mask.sum() for mask in masks.values())), desc="pack rows", unit=" samples") as bar:
            for planned, row in enumerate(plan_rows(share.chunks, masks, self.measured, self.settings)):
                costs.append(row.cost)
                bar.update(len(row.samples))
                if planned < progress.planned:
                    continue
                before = (writer.num_shards, writer.num_samples, len(late))
                documents, media = self._load(row, late)
                if documents:
                    writer.write(documents, media)
                if writer.num_shards > before[0]:
                    kept = [asdict(entry) for entry in late[: before[2]]]
                    write_json(progress_path, asdict(_Progress(writer.num_shards, before[1], planned, kept)))
        if writer.num_rows:
            index = writer.close(with_index=False)
            write_json(chunk_path(folder, share.number, "index.json"), index.model_dump(mode="json"))
        np.save(chunk_path(folder, share.number, "costs.npy"), np.array(costs))
        return self._report(share, folder, dropped + late, writer.num_samples)

    def _open(self, share: Share, progress: _Progress) -> ShardWriter:
        chat = Chat(self.settings.processor)
        return ShardWriter(
            self.target, length=self.settings.length, align=self.settings.align, vocab_size=chat.vocab_size,
            image_token=chat.image_token, pad_token=chat.pad_token, image_limits=chat.image.limits,
            patch_size=chat.image.patch_size, merge_size=chat.image.merge_size, shard_bytes=self.settings.shard_mib << 20,
            prefix=share.prefix, keep_shards=progress.num_shards, keep_samples=progress.num_samples,
        )  # fmt: skip

    def _load(self, row: PlannedRow, dropped: list[Dropped]) -> tuple[list[Document], list[list[Picture | Clip]]]:
        """The row's documents and the bytes of their media; a sample whose media are gone by now is left out."""
        documents: list[Document] = []
        media: list[list[Picture | Clip]] = []
        for chunk, index in row.samples:
            sample = chunk.sample(index)
            try:
                media.append([_read_medium(medium) for medium in sample.media])
                documents.append(sample.document)
            except Fault as fault:
                dropped.append(fault.dropped(sample.source, sample.document.key))
        return documents, media

    def _report(self, share: Share, folder: Path, dropped: Sequence[Dropped], num_kept: int) -> Tally:
        """The faults of measuring come first: this is the last pass, and its list is the whole one."""
        lines = [chunk_path(self.measured, number, "dropped.jsonl").read_text(encoding="utf-8") for number in share.chunks]
        early = [Dropped(**json.loads(line)) for text in lines for line in text.splitlines()]
        both = [*early, *dropped]
        text = "".join(entry.line() + "\n" for entry in both)
        chunk_path(folder, share.number, "dropped.jsonl").write_text(text, encoding="utf-8")
        reasons = dict(Counter(entry.reason for entry in both))
        return Tally(num_kept + len(both), num_kept, reasons, sum(entry.is_fault for entry in both))


@dataclass(frozen=True)
class _Progress:
    """What stands in complete shards: their number, samples, rows planned before the next one, samples lost while writing."""

    num_shards: int = 0
    num_samples: int = 0
    planned: int = 0
    dropped: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class PlannedRow:
    """A row before its contents are read: its samples as (chunk, place in it), and what it costs, in tokens."""

    samples: tuple[tuple[MeasuredChunk, int], ...]
    cost: float


def select_samples(
    numbers: Sequence[int], folder: Path, settings: RowSettings
) -> tuple[dict[int, npt.NDArray[np.bool_]], list[Dropped]]:
    """Which measured samples are packed, and what is left out.

    A sample with the key and the contents of an earlier one is left out; one that only has the same key stays.

    Raises:
        SampleError: a sample is longer than a row, without skip_long.
    """
    masks: dict[int, npt.NDArray[np.bool_]] = {}
    dropped: list[Dropped] = []
    chunks = {number: MeasuredChunk(folder, number) for number in numbers}
    repeats = _find_repeats(list(chunks.values()))
    too_long: list[Dropped] = []
    for (number, chunk), repeated in zip(chunks.items(), repeats, strict=True):
        tokens = -(-chunk.lengths // settings.align) * settings.align > settings.length
        patches = chunk.patches > (settings.max_patches if settings.max_patches is not None else np.inf)
        masks[number] = ~(tokens | patches | repeated)
        for index in np.flatnonzero(~masks[number]).tolist():
            entry = chunk.entry(index)
            if repeated[index]:
                fault = Fault("key_duplicate", "an earlier sample has the same key and the same contents", entry["key"])
                dropped.append(fault.dropped(entry["source"]))
            elif tokens[index]:
                detail = f"{chunk.lengths[index]} tokens, a row has {settings.length}"
                too_long.append(Dropped(entry["source"], entry["key"], "longer_than_row", detail, is_fault=False))
            else:
                detail = f"{chunk.patches[index]} patches, a row has {settings.max_patches}"
                too_long.append(Dropped(entry["source"], entry["key"], "more_patches_than_row", detail, is_fault=False))
    if too_long and not settings.skip_long:
        first = too_long[0]
        raise SampleError(first.key, first.reason.replace("_", " "), f"{first.detail}; {len(too_long)} such samples in all; "
                          "raise --length or --patches, or leave them out with --skip-long")  # fmt: skip
    return masks, dropped + too_long


def _find_repeats(chunks: Sequence[MeasuredChunk]) -> list[npt.NDArray[np.bool_]]:
    """For each chunk, which samples repeat an earlier one."""
    contents = np.concatenate([np.empty(0, np.uint64), *(chunk.digests[:, 1] for chunk in chunks)])
    repeated = np.ones(len(contents), dtype=np.bool_)
    repeated[np.unique(contents, return_index=True)[1]] = False
    return np.split(repeated, np.cumsum([len(chunk) for chunk in chunks]))[: len(chunks)]


def plan_rows(
    numbers: Sequence[int], masks: dict[int, npt.NDArray[np.bool_]], folder: Path, settings: RowSettings
) -> Iterator[PlannedRow]:
    """Rows of samples, window by window; only lengths and patches are read."""
    costs = cost_model(ModelConfig(preset=settings.model).shape)
    pool: list[tuple[MeasuredChunk, int]] = []
    for place, number in enumerate(numbers):
        chunk = MeasuredChunk(folder, number)
        pool += [(chunk, index) for index in np.flatnonzero(masks[number]).tolist()]
        is_last = place == len(numbers) - 1
        if not pool or (len(pool) < WINDOW and not is_last):
            continue
        lengths, trained, patches, squares = (
            np.array([getattr(held, name)[index] for held, index in pool])
            for name in ("lengths", "trained", "patches", "squared_patches")
        )
        extra = costs.extra(lengths, trained, patches, squares)
        rows = pack_lengths(
            lengths, settings.length, align=settings.align, patches=patches, max_patches=settings.max_patches, extra=extra,
            seed=settings.seed,
        )  # fmt: skip
        carried: list[int] = []
        for row in rows:
            tokens = (-(-lengths[row] // settings.align) * settings.align).sum() / settings.length
            load = patches[row].sum() / settings.max_patches if settings.max_patches else 0.0
            if is_last or max(tokens, load) >= CARRIED_BELOW:
                yield PlannedRow(tuple(pool[index] for index in row), settings.length + float(extra[row].sum()))
            else:
                carried += row
        pool = [pool[index] for index in sorted(carried)]


def _read_medium(medium: PackedMedium) -> Picture | Clip:
    data = read_bytes(MediaRef("video" if medium.kind == "video" else "image", medium.name, medium.place))
    if medium.kind == "video":
        return Clip(data, medium.extension, medium.height, medium.width, medium.frame_indices)
    if medium.converted:
        try:
            data = convert_picture(data)
        except PictureError as error:
            raise Fault("image_broken", f"{medium.name}: {error}") from None
        return Picture(data, "png", medium.height, medium.width)
    return Picture(data, medium.extension, medium.height, medium.width, medium.orientation)
