"""What one rank's model reads of one row: its tokens, positions, segments and pictures, on its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_glmv.config.model import ModelShape
from megatron_glmv.model.position import frame_coordinates
from megatron_glmv.model.segments import Segments, make_segments
from megatron_glmv.sequence.cost import deal_frames
from megatron_glmv.sequence.packed import PackedSequence
from megatron_glmv.sequence.patches import join_frames
from megatron_glmv.sequence.shard import context_indices, trained_indices
from megatron_glmv.sequence.transfer import to_device


@dataclass(frozen=True)
class VisionInputs:
    """Pictures of one row that this rank encodes, padded so that tensor ranks share them evenly. N = patches with padding.

    Attributes:
        patches: [N, patch_dim] uint8 pixels, or floats already normalised.
        coordinates: [4, N] int64: row, column, rows and columns of the frame.
        segments: the frames.
        feature_index: [v] int64, which merged features belong to tokens of this rank.
        token_index: [v] int64, those tokens' places among this rank's tokens.
        num_shared: merged features, padding included, that each of the ranks gives which divide the frames among them; 0: they
            do not.
    """

    patches: Tensor
    coordinates: Tensor
    segments: Segments
    feature_index: Tensor
    token_index: Tensor
    num_shared: int = 0


@dataclass(frozen=True)
class FrameShare:
    """This rank among those that divide the frames of a row."""

    rank: int = 0
    num_ranks: int = 1


@dataclass(frozen=True)
class TokenShare:
    """This tensor rank among those that hold parts of a context rank's tokens (sequence parallelism).

    Attributes:
        rank: of this one.
        num_ranks: of all.
        multiple: what each takes behind the last attention is a multiple of this (config/fp8.py, `trained_multiple`).
    """

    rank: int = 0
    num_ranks: int = 1
    multiple: int = 1


@dataclass(frozen=True)
class ModelInputs:
    """One row for one rank. S = tokens of this rank, K = those whose loss is asked for.

    Attributes:
        tokens: [1, S] int64.
        label_index: [K] int64 on the host, which of the row's tokens the labels belong to.
        labels: [1, K] int64.
        loss_weights: [1, K] float32.
        positions: [3, S] int64.
        segments: the documents.
        vision: pictures, on ranks that run the vision tower.
    """

    tokens: Tensor
    label_index: Tensor
    labels: Tensor
    loss_weights: Tensor
    positions: Tensor
    segments: Segments
    vision: VisionInputs | None


def make_inputs(
    row: PackedSequence,
    shape: ModelShape,
    device: torch.device,
    *,
    tensor: int = 1,
    context: int = 1,
    context_rank: int = 0,
    with_vision: bool = True,
    merged_multiple: int = 1,
    share: FrameShare = FrameShare(),
    trained: TokenShare | None = None,
) -> ModelInputs:
    """Cut one row for one rank; nothing here waits for a device.

    Args:
        row: the whole row; its patches are needed with `with_vision`.
        device: where the model runs.
        tensor: tensor ranks of the vision tower, which share the patches evenly.
        context: ranks that share the row's tokens.
        context_rank: this rank among them.
        with_vision: whether this rank runs the vision tower.
        merged_multiple: a tensor rank's merged tokens are padded to a multiple of this (config/fp8.py, `merged_multiple`).
        share: which of the row's frames this rank encodes.
        trained: with it, only trained tokens go on behind the last attention, K of S; without it all do.
    """
    local = context_indices(row.document_lengths, context, context_rank)
    segments, labelled = make_segments(row.document_lengths, device, context, context_rank), local
    if trained is not None:
        parts = trained_indices(row.loss_weights[local] > 0, trained.num_ranks, trained.multiple)
        if parts.numel() < len(local):
            labelled = local[parts.flatten()]
            segments.going_on = to_device(parts[trained.rank] - trained.rank * (len(local) // trained.num_ranks), device)
    return ModelInputs(
        tokens=to_device(row.tokens[local].unsqueeze(0), device),
        label_index=labelled,
        labels=to_device(row.labels[labelled].unsqueeze(0), device),
        loss_weights=to_device(row.loss_weights[labelled].unsqueeze(0), device),
        positions=to_device(row.positions[:, local], device),
        segments=segments,
        vision=_vision_inputs(row, shape, device, tensor * merged_multiple, local, share) if with_vision else None,
    )


def _vision_inputs(
    row: PackedSequence, shape: ModelShape, device: torch.device, multiple: int, local: Tensor, share: FrameShare
) -> VisionInputs:
    """Take this rank's frames, pad them with one blank frame, and find which features this rank's tokens take.

    A rank without frames gets a blank one alone: the tower then runs, and its parameters have (zero) gradients, on every
    micro-batch of every rank, which overlapped gradient reduction needs.
    """
    merge = shape.vision.spatial_merge_size
    grids = [(int(rows), int(columns)) for rows, columns in row.frames.tolist()]
    sizes = [rows * columns for rows, columns in grids]
    shares = deal_frames(shape.vision, sizes, share.num_ranks)
    unit = merge**2 * multiple
    blanks = [_blank(sum(sizes[frame] for frame in own), unit) for own in shares]
    own, blank = shares[share.rank], blanks[share.rank]
    frames = [grids[frame] for frame in own] + ([(merge, blank // merge)] if blank else [])
    patches = _own_patches(row, shape, device, sizes, own)
    if blank:
        patches = torch.cat((patches, patches.new_zeros(blank, patches.shape[1])))
    padded = [(sum(sizes[frame] for frame in own) + blank) // merge**2 for own, blank in zip(shares, blanks, strict=True)]
    feature_of_token = torch.full((len(row.tokens),), -1)
    feature_of_token[row.visual_index] = _places(sizes, shares, max(padded), merge**2)
    features = feature_of_token[local]
    token_index = torch.nonzero(features >= 0).flatten()
    return VisionInputs(
        patches=patches,
        coordinates=to_device(frame_coordinates(frames, merge), device),
        segments=make_segments([rows * columns for rows, columns in frames], device),
        feature_index=to_device(features[token_index], device),
        token_index=to_device(token_index, device),
        num_shared=max(padded) if share.num_ranks > 1 else 0,
    )


def _blank(num_patches: int, unit: int) -> int:
    """Patches of the blank frame that fills up to a multiple, and is there where no other is."""
    return -num_patches % unit or (0 if num_patches else unit)


def _own_patches(row: PackedSequence, shape: ModelShape, device: torch.device, sizes: list[int], own: list[int]) -> Tensor:
    """The patches of some of the row's frames, in order, on the device."""
    if row.patches is None:
        return torch.empty(0, shape.vision.patch_dim, dtype=torch.uint8, device=device)
    patches = to_device(row.patches, device)
    if row.moving is not None:
        patches = join_frames(patches, row.frames, row.moving)
    if len(own) == len(sizes):
        return patches
    parts = patches.split(sizes)
    return torch.cat([parts[frame] for frame in own]) if own else patches[:0]


def _places(sizes: list[int], shares: list[list[int]], length: int, block: int) -> Tensor:
    """[merged tokens of the row] int64: where each one's feature stands when every rank's, `length` of them, are joined."""
    parts: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(sizes)
    for rank, own in enumerate(shares):
        start = rank * length
        for frame in own:
            merged = sizes[frame] // block
            parts[frame] = torch.arange(start, start + merged)
            start += merged
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
