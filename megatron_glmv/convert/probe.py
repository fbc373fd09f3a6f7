"""The fixed rows on which a conversion is proven: text, one image, several images, a video, and all of them packed in one row.

Every document has its own length and its pictures their own shapes, so that a wrong order of rows, columns, frames or heads, a
lost bias or a missing document mask shows in the logits. Tokens and pixels are random, but the same for every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_glmv.config.model import ModelShape
from megatron_glmv.sequence.packed import Document, PackedSequence, pack

SEED = 20250701


@dataclass(frozen=True)
class Picture:
    """An image of `rows` x `columns` merged tokens, or a video of `frames` such frames."""

    rows: int
    columns: int
    frames: int | None = None


DOCUMENTS: dict[str, Sequence[int | Picture]] = {
    "text": (24,),
    "one image": (4, Picture(3, 4), 6),
    "several images": (2, Picture(2, 3), 2, Picture(5, 2), 1, Picture(1, 1), 4),
    "video": (3, Picture(2, 3, frames=3), 5),
}
"""The documents in short: a number is that many text tokens."""


@dataclass(frozen=True)
class Probe:
    """The documents of `DOCUMENTS` for one architecture. B = documents, L = longest of them.

    Attributes:
        row: all documents packed in one row, with their pictures.
        lengths: tokens of each document.
        input_ids: [B, L] int64, right-padded.
        types: [B, L] int64, Hugging Face's mm_token_type_ids: 0 text, 1 image, 2 video.
        mask: [B, L] int64, 1 where there is a token.
        image_patches: [Ni, patch_dim] float32.
        image_grids: each document's images, [frames, rows, columns] in patches.
        video_patches: [Nv, patch_dim] float32.
        video_grids: each document's videos, likewise.
    """

    row: PackedSequence
    lengths: tuple[int, ...]
    input_ids: Tensor
    types: Tensor
    mask: Tensor
    image_patches: Tensor
    image_grids: tuple[tuple[tuple[int, int, int], ...], ...]
    video_patches: Tensor
    video_grids: tuple[tuple[tuple[int, int, int], ...], ...]


def make_probe(shape: ModelShape) -> Probe:
    """The probe of one architecture; the same in every process."""
    rng = np.random.default_rng(SEED)
    documents, types, grids = [], [], []
    for name, script in DOCUMENTS.items():
        document, kinds, media = _document(rng, shape, name, script)
        documents.append(document)
        types.append(torch.tensor(kinds))
        grids.append(media)
    num_patches = [sum(t * h * w for media in grids for kind, (t, h, w) in media if kind == wanted) for wanted in (1, 2)]
    patches = torch.from_numpy(rng.standard_normal((sum(num_patches), shape.vision.patch_dim), dtype=np.float32))
    lengths = tuple(len(document.tokens) for document in documents)
    special, merge = shape.tokens, shape.vision.spatial_merge_size
    row = pack(
        documents,
        sum(lengths),
        image_token=special.image,
        pad_token=special.pad,
        merge=merge,
        patches=patches,
        key="probe",
    )
    ids = [torch.from_numpy(np.asarray(document.tokens)).long() for document in documents]
    pad = torch.nn.utils.rnn.pad_sequence
    return Probe(
        row=row,
        lengths=lengths,
        input_ids=pad(ids, batch_first=True, padding_value=special.pad),
        types=pad(types, batch_first=True),
        mask=pad([torch.ones(length, dtype=torch.int64) for length in lengths], batch_first=True),
        image_patches=patches[: num_patches[0]],
        image_grids=tuple(tuple(grid for kind, grid in media if kind == 1) for media in grids),
        video_patches=patches[num_patches[0] :],
        video_grids=tuple(tuple(grid for kind, grid in media if kind == 2) for media in grids),
    )


def _document(
    rng: np.random.Generator, shape: ModelShape, name: str, script: Sequence[int | Picture]
) -> tuple[Document, list[int], list[tuple[int, tuple[int, int, int]]]]:
    """A document of random words around its pictures, the type of each token, and (type, grid) of each picture."""
    special, merge = shape.tokens, shape.vision.spatial_merge_size
    reserved = {value for field in special.model_dump().values() for value in (field if isinstance(field, tuple) else (field,))}
    tokens: list[int] = []
    kinds: list[int] = []
    frames: list[tuple[int, int]] = []
    media: list[tuple[int, tuple[int, int, int]]] = []

    def add(found: Sequence[int], kind: int = 0) -> None:
        tokens.extend(found)
        kinds.extend([kind] * len(found))

    def words(count: int) -> list[int]:
        drawn = (int(word) for word in iter(lambda: rng.integers(shape.text.vocab_size), None))
        return [next(word for word in drawn if word not in reserved) for _ in range(count)]

    for part in script:
        if isinstance(part, int):
            add(words(part))
            continue
        kind, size = (1 if part.frames is None else 2), (part.rows * merge, part.columns * merge)
        add([special.video_start] if kind == 2 else [])
        for _ in range(part.frames or 1):
            add([special.image_start])
            add([special.image] * (part.rows * part.columns), kind)
            add([special.image_end, *(words(1) if kind == 2 else [])])
            frames.append(size)
        add([special.video_end] if kind == 2 else [])
        media.append((kind, (part.frames or 1, *size)))
    return Document(np.array(tokens), np.ones(len(tokens), dtype=np.float32), tuple(frames), name), kinds, media
