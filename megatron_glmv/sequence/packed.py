"""`PackedSequence`: several documents end to end in one row, with pictures: what data, model and RL share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_glmv.config.base import InputError
from megatron_glmv.sequence.positions import multimodal_positions

PADDING_DOCUMENT = 256
"""Most tokens of the documents that fill the end of a row: short ones, because attention within them is wasted work."""


class RowError(InputError):
    """A row that cannot be built or used; the message names the sample or row."""


@dataclass(frozen=True)
class Document:
    """One sample as tokens, with visual placeholders already expanded.

    Attributes:
        tokens: [n] int, ids.
        loss_weights: [n] float, weight of predicting this token from those before it; 0 is not trained.
        frames: (rows, columns) in patches of each image, or of each temporal patch of each video, in token order.
        key: name of the sample, for messages.
    """

    tokens: npt.NDArray[np.integer]
    loss_weights: npt.NDArray[np.floating]
    frames: tuple[tuple[int, int], ...] = ()
    key: str = ""

    @property
    def num_trained(self) -> int:
        """Tokens whose prediction has a weight; nothing is before the first."""
        return int(np.count_nonzero(self.loss_weights[1:]))


@dataclass(frozen=True)
class PackedSequence:
    """One row of the batch. S = tokens, F = frames, N = patches.

    Attributes:
        tokens: [S] int64 ids.
        labels: [S] int64, the next token of the same document (0 where there is none).
        loss_weights: [S] float32, weight of labels; 0 where nothing is trained.
        positions: [3, S] int64, time / row / column, each document from 0.
        document_lengths: tokens of each document, padding documents at the end included; they sum to S.
        num_useful: tokens that are not padding.
        frames: [F, 2] int64, patch rows and columns of each frame, in token order.
        visual_index: [V] int64, where in the row the merged visual tokens stand, in feature order.
        patches: [N, channels x temporal x patch x patch] in Hugging Face's patch order, uint8 pixels or normalised; where
            `moving` is given the flat form of `sequence.patches.join_frames`; None on ranks that do not run the vision tower.
        moving: [F] bool, which frames are a video's; None where patches are not flat.
        documents: (key, start, end) of every real document, for masking and messages.
        key: name of the row.
    """

    tokens: Tensor
    labels: Tensor
    loss_weights: Tensor
    positions: Tensor
    document_lengths: tuple[int, ...]
    num_useful: int
    frames: Tensor
    visual_index: Tensor
    patches: Tensor | None = None
    documents: tuple[tuple[str, int, int], ...] = ()
    key: str = ""
    moving: Tensor | None = None

    @property
    def num_patches(self) -> int:
        """Patches of all frames."""
        return int((self.frames[:, 0] * self.frames[:, 1]).sum()) if len(self.frames) else 0

    @property
    def num_trained(self) -> int:
        """Tokens that have a label with a weight."""
        return int(torch.count_nonzero(self.loss_weights))


def pack(
    documents: Sequence[Document],
    length: int,
    *,
    image_token: int,
    pad_token: int,
    align: int = 1,
    merge: int = 2,
    patches: Tensor | None = None,
    moving: Sequence[bool] | None = None,
    key: str = "",
) -> PackedSequence:
    """Lay `documents` end to end in a row of `length` tokens.

    Each document is padded to a multiple of `align` tokens; what is left of the row becomes padding documents. `patches` and
    `moving` are those of the PackedSequence.

    Raises:
        RowError: the documents are longer than the row, or a document's visual tokens and frames do not match.
    """
    tokens = np.full(length, pad_token, dtype=np.int64)
    labels = np.zeros(length, dtype=np.int64)
    weights = np.zeros(length, dtype=np.float32)
    positions = np.empty((3, length), dtype=np.int64)
    lengths: list[int] = []
    spans: list[tuple[str, int, int]] = []
    frames: list[tuple[int, int]] = []
    start = useful = 0
    for document in documents:
        size = len(document.tokens)
        padded = -(-size // align) * align
        if start + padded > length:
            needed = sum(-(-len(d.tokens) // align) * align for d in documents)
            raise RowError(f"row {key!r}: {needed} tokens (documents padded to multiples of {align}) in a row of {length}; "
                           "pack again with a smaller --length, or raise data.sequence_length")  # fmt: skip
        end = start + size
        tokens[start:end] = document.tokens
        labels[start : end - 1] = document.tokens[1:]
        weights[start : end - 1] = document.loss_weights[1:]
        is_visual = np.zeros(padded, dtype=np.bool_)
        is_visual[:size] = document.tokens == image_token
        try:
            positions[:, start : start + padded] = multimodal_positions(is_visual, document.frames, merge)
        except ValueError as error:
            raise RowError(f"row {key!r}, sample {document.key!r}: {error}") from None
        lengths.append(padded)
        spans.append((document.key, start, end))
        frames.extend(document.frames)
        useful += size
        start += padded
    # As align has it, or context ranks could not cut them.
    filling = max(align, PADDING_DOCUMENT // align * align)
    while start < length:
        size = min(filling, length - start)
        positions[:, start : start + size] = np.arange(size)
        lengths.append(size)
        start += size
    return PackedSequence(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_weights=torch.from_numpy(weights),
        positions=torch.from_numpy(positions),
        document_lengths=tuple(lengths),
        num_useful=useful,
        frames=torch.tensor(frames, dtype=torch.int64).reshape(-1, 2),
        visual_index=torch.from_numpy(np.flatnonzero(tokens == image_token)),
        patches=patches,
        documents=tuple(spans),
        key=key,
        moving=None if moving is None else torch.tensor(moving, dtype=torch.bool),
    )


def mask_documents(row: PackedSequence, documents: Sequence[int]) -> PackedSequence:
    """The row with nothing trained in `documents` (indexes into row.documents), for samples whose pictures do not decode."""
    weights = row.loss_weights.clone()
    for document in documents:
        _, start, end = row.documents[document]
        weights[start:end] = 0.0
    return replace(row, loss_weights=weights)
