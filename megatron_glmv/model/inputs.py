"""What one rank's model reads of one row: its tokens, positions, segments and pictures, on its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_glmv.config.model import ModelShape
from megatron_glmv.model.position import frame_coordinates
from megatron_glmv.model.segments import Segments, make_segments
from megatron_glmv.sequence.packed import PackedSequence
from megatron_glmv.sequence.patches import join_frames
from megatron_glmv.sequence.shard import context_indices


@dataclass(frozen=True)
class VisionInputs:
    """Pictures of one row, padded so that tensor ranks share them evenly. N = patches with padding, F = frames.

    Attributes:
        patches: [N, patch_dim] uint8 pixels, or floats already normalised.
        coordinates: [4, N] int64: row, column, rows and columns of the frame.
        segments: the frames.
        feature_index: [v] int64, which merged features belong to tokens of this rank.
        token_index: [v] int64, those tokens' places among this rank's tokens.
    """

    patches: Tensor
    coordinates: Tensor
    segments: Segments
    feature_index: Tensor
    token_index: Tensor


@dataclass(frozen=True)
class ModelInputs:
    """One row for one rank. S = tokens of this rank.

    Attributes:
        tokens: [1, S] int64.
        labels: [1, S] int64.
        loss_weights: [1, S] float32.
        positions: [3, S] int64.
        segments: the documents.
        vision: pictures, on ranks that run the vision tower.
    """

    tokens: Tensor
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
) -> ModelInputs:
    """Cut one row for one rank.

    Args:
        row: the whole row; its patches are needed with `with_vision`.
        device: where the model runs.
        tensor: tensor ranks, which share the patches evenly.
        context: ranks that share the row's tokens.
        context_rank: this rank among them.
        with_vision: whether this rank runs the vision tower.
        merged_multiple: a tensor rank's merged tokens are padded to a multiple of this; FP8 products need 16.
    """
    local = context_indices(row.document_lengths, context, context_rank)
    return ModelInputs(
        tokens=row.tokens[local].unsqueeze(0).to(device),
        labels=row.labels[local].unsqueeze(0).to(device),
        loss_weights=row.loss_weights[local].unsqueeze(0).to(device),
        positions=row.positions[:, local].to(device),
        segments=make_segments(row.document_lengths, device, context, context_rank),
        vision=_vision_inputs(row, shape, device, tensor * merged_multiple, local) if with_vision else None,
    )


def _vision_inputs(row: PackedSequence, shape: ModelShape, device: torch.device, multiple: int, local: Tensor) -> VisionInputs:
    """Pad the row's pictures with one blank frame, and find which features this rank's tokens take.

    A row without pictures gets a blank frame alone: the tower then runs, and its parameters have (zero) gradients, on every
    micro-batch of every rank, which overlapped gradient reduction needs.
    """
    merge = shape.vision.spatial_merge_size
    frames = [(int(rows), int(columns)) for rows, columns in row.frames.tolist()]
    patches = row.patches if row.patches is not None else torch.empty(0, shape.vision.patch_dim, dtype=torch.uint8)
    unit = merge**2 * multiple
    patches = patches.to(device, non_blocking=True)
    if row.patches is not None and row.moving is not None:
        patches = join_frames(patches, row.frames, row.moving)
    blank = -len(patches) % unit or (0 if frames else unit)
    if blank:
        frames.append((merge, blank // merge))
        patches = torch.cat((patches, patches.new_zeros(blank, patches.shape[1])))
    feature_of_token = torch.full((len(row.tokens),), -1)
    feature_of_token[row.visual_index] = torch.arange(len(row.visual_index))
    features = feature_of_token[local]
    token_index = torch.nonzero(features >= 0).flatten()
    return VisionInputs(
        patches=patches,
        coordinates=frame_coordinates(frames, merge).to(device),
        segments=make_segments([rows * columns for rows, columns in frames], device),
        feature_index=features[token_index].to(device),
        token_index=token_index.to(device),
    )
