"""From a picture's size to its resized size, its grid of patches and its number of tokens.

Source: transformers 5.23.0, models/glm4v/image_processing_glm4v.py (`smart_resize`) and
video_processing_glm4v.py (`sample_frames`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PIXEL_FACTOR = 28
"""Resized sides are multiples of this: patch size 14 times merge size 2."""


@dataclass(frozen=True)
class PixelLimits:
    """Bounds on frames x height x width after resizing; an image counts as two frames."""

    min_pixels: int = 12_544
    max_pixels: int = 9_633_792


IMAGE_LIMITS = PixelLimits()
VIDEO_LIMITS = PixelLimits(max_pixels=47_040_000)
"""Of the released processors, both generations."""


@dataclass(frozen=True)
class Grid:
    """Patches of one picture or video: temporal patches x rows x columns (unmerged)."""

    frames: int
    rows: int
    columns: int

    @property
    def num_patches(self) -> int:
        """Patches that enter the vision tower."""
        return self.frames * self.rows * self.columns

    @property
    def frame(self) -> tuple[int, int]:
        """(rows, columns) of one temporal patch."""
        return self.rows, self.columns

    def num_tokens(self, merge: int = 2) -> int:
        """Merged tokens that enter the decoder."""
        return self.num_patches // merge**2


def smart_resize(
    num_frames: int, height: int, width: int, limits: PixelLimits, factor: int = PIXEL_FACTOR, temporal_factor: int = 2
) -> tuple[int, int]:
    """The size (height, width) in pixels that a picture is resized to.

    Args:
        num_frames: 2 for an image, the number of sampled frames for a video.
        height: pixels before.
        width: pixels before.
        limits: bounds on num_frames x height x width.

    Raises:
        ValueError: fewer frames than temporal_factor, or an aspect ratio over 200.
    """
    if num_frames < temporal_factor:
        raise ValueError(f"{num_frames} frames; at least {temporal_factor} are needed")
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > 200:
        raise ValueError(f"aspect ratio of {width} x {height} pixels is over 200")
    new_frames = round(num_frames / temporal_factor) * temporal_factor
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_frames * new_height * new_width > limits.max_pixels:
        beta = math.sqrt(num_frames * height * width / limits.max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_frames * new_height * new_width < limits.min_pixels:
        beta = math.sqrt(limits.min_pixels / (num_frames * height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def image_grid(height: int, width: int, limits: PixelLimits, patch_size: int = 14) -> Grid:
    """The patch grid of an image of `height` x `width` pixels."""
    new_height, new_width = smart_resize(2, height, width, limits, factor=2 * patch_size)
    return Grid(1, new_height // patch_size, new_width // patch_size)
