"""From a resized picture to rows of patches in Hugging Face's order, and from bytes to the values that the vision tower reads.

Loaders ship bytes in a flat form that costs them one copy of long runs: a picture once, colours side by side. The training
device doubles pictures, parts colours and normalises: an eighth of the traffic of floats, and the same values.

Source: transformers 5.23.0, models/glm4v/image_processing_glm4v.py (`_preprocess`) and image_processing_backends.py
(`rescale_and_normalize`, the fused form); mean and deviation are CLIP's, of image_utils.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from megatron_glmv.sequence.transfer import to_device

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def patchify(picture: Tensor, patch: int = 14, temporal: int = 2, merge: int = 2) -> Tensor:
    """Cut a picture into patches: 2 x 2 blocks row by row, row by row within a block, the picture in every temporal slot.

    Args:
        picture: [height, width, channels], any dtype; both sides are multiples of patch x merge.
        patch: side of a patch in pixels.
        temporal: frames that one patch covers.
        merge: patches a side of a block that becomes one token.

    Returns:
        [height x width / patch^2, channels x temporal x patch x patch], the dtype of `picture`; each row is flattened
        (channel, frame, row, column).

    Raises:
        ValueError: a side is not a multiple of patch x merge.
    """
    height, width, channels = picture.shape
    if height % (patch * merge) or width % (patch * merge):
        raise ValueError(f"a picture of {height} x {width} pixels cannot be cut into blocks of {patch * merge} pixels")
    blocks = picture.reshape(height // (patch * merge), merge, patch, width // (patch * merge), merge, patch, channels)
    blocks = blocks.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels, 1, patch, patch)
    return blocks.expand(-1, -1, temporal, -1, -1).reshape(len(blocks), -1)


def cut_patches(picture: Tensor, patch: int = 14, merge: int = 2, out: Tensor | None = None) -> Tensor:
    """The flat patches of one frame, in the order of `patchify`.

    Args:
        picture: [height, width, channels], any dtype; both sides are multiples of patch x merge.
        patch: side of a patch in pixels.
        merge: patches a side of a block that becomes one token.
        out: [height x width / patch^2, patch x patch x channels], filled instead of a new tensor.

    Returns:
        [height x width / patch^2, patch x patch x channels], the dtype of `picture`; a row is flattened (row, column, channel).

    Raises:
        ValueError: a side is not a multiple of patch x merge.
    """
    height, width, channels = picture.shape
    if height % (patch * merge) or width % (patch * merge):
        raise ValueError(f"a picture of {height} x {width} pixels cannot be cut into blocks of {patch * merge} pixels")
    rows, columns = height // (patch * merge), width // (patch * merge)
    lines = picture.reshape(rows, merge, patch, columns, merge, patch * channels).permute(0, 3, 1, 4, 2, 5)
    if out is None:
        return lines.reshape(-1, patch * patch * channels)
    out.view(lines.shape).copy_(lines)
    return out


def num_flat_patches(frames: Tensor, moving: Tensor) -> int:
    """Rows of the flat patches that `join_frames` reads: of a picture once, of a video's temporal patch its two frames."""
    return int((frames[:, 0] * frames[:, 1] * (1 + moving.long())).sum())


def join_frames(patches: Tensor, frames: Tensor, moving: Tensor) -> Tensor:
    """Patches of two frames each, from those of single frames: a picture fills both places, a video's frames one each.

    Args:
        patches: [M, patch x patch x 3] on any device, as `cut_patches` makes them: of each temporal patch those of its first
            frame, then, for a video, those of its second.
        frames: [F, 2] rows and columns of each temporal patch.
        moving: [F] bool, which of them are a video's.

    Returns:
        [N, 3 x 2 x patch x patch], one row a patch of the tower.
    """
    sizes = frames[:, 0] * frames[:, 1]
    flat = sizes * (1 + moving.long())
    inside = torch.arange(int(sizes.sum())) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    first = torch.repeat_interleave(flat.cumsum(0) - flat, sizes) + inside
    second = first + torch.repeat_interleave(sizes * moving.long(), sizes)
    channels, width = len(CLIP_MEAN), patches.shape[1]
    colours = patches.view(len(patches), width // channels, channels).transpose(1, 2).contiguous()
    slots = [colours.index_select(0, to_device(index, patches.device)) for index in (first, second)]
    return torch.stack(slots, dim=2).view(len(first), 2 * width)


def normalize_patches(patches: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that the vision tower reads, from the bytes that the loader ships.

    Computed in float32 as (x - 255 mean) / (255 std), Hugging Face's fused form, and cast at the end.

    Args:
        patches: [N, 3 x temporal x patch x patch] uint8, rows flattened channel first; on any device.
        dtype: of the result.

    Returns:
        [N, the same], `dtype`.
    """
    channels = len(CLIP_MEAN)
    mean, std = _mean_and_deviation(patches.device)
    values = patches.to(torch.float32).view(len(patches), channels, patches.shape[1] // channels)
    return values.sub_(mean).div_(std).view(patches.shape).to(dtype)


@lru_cache
def _mean_and_deviation(device: torch.device) -> tuple[Tensor, Tensor]:
    """[1, 3, 1] float32 each, in grey levels, put on the device once."""
    with torch.inference_mode(False):
        mean, std = ((torch.tensor(values, device=device) * 255.0).view(1, -1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return mean, std
