"""Sizes and grids against transformers' `smart_resize`, rounding and errors included."""

from __future__ import annotations

import random

import pytest
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize as hf_smart_resize

from megatron_glmv.sequence.grid import IMAGE_LIMITS, VIDEO_LIMITS, Grid, PixelLimits, image_grid, smart_resize

SMALL_LIMITS = PixelLimits(min_pixels=2 * 28 * 28, max_pixels=2 * 40 * 28 * 28)


def _hf(frames, height, width, limits):
    """The size that transformers gives, or None where it refuses."""
    try:
        return hf_smart_resize(frames, height, width, min_pixels=limits.min_pixels, max_pixels=limits.max_pixels)
    except ValueError:
        return None


def _ours(frames, height, width, limits):
    try:
        return smart_resize(frames, height, width, limits)
    except ValueError:
        return None


@pytest.mark.parametrize("limits", [IMAGE_LIMITS, VIDEO_LIMITS, SMALL_LIMITS])
def test_random_sizes(limits):
    rng = random.Random(5)
    refused = 0
    for number in range(400):
        frames = 2 if number % 2 else rng.randint(1, 40)
        height, width = (int(2 ** rng.uniform(0, 12.5)) for _ in range(2))
        expected = _hf(frames, height, width, limits)
        assert _ours(frames, height, width, limits) == expected, (frames, height, width)
        refused += expected is None
    assert 0 < refused < 200


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (28, 28, (84, 84)),
        (20, 50, (56, 140)),
        (100, 100, (112, 112)),
        (1080, 1920, (1092, 1932)),
        (4000, 4000, (2184, 2184)),
        (10, 2000, (28, 5600)),
        (70, 980, (56, 980)),  # 70 / 28 = 2.5 rounds to the even 2
    ],
)
def test_measured_sizes(height, width, expected):
    assert smart_resize(2, height, width, IMAGE_LIMITS) == expected == _hf(2, height, width, IMAGE_LIMITS)
    grid = image_grid(height, width, IMAGE_LIMITS)
    assert grid == Grid(1, expected[0] // 14, expected[1] // 14)
    assert grid.num_tokens() * 4 == grid.num_patches == grid.rows * grid.columns


def test_patch_counts_equal_the_image_processor():
    processor = Glm4vImageProcessorPil(size={"shortest_edge": IMAGE_LIMITS.min_pixels, "longest_edge": IMAGE_LIMITS.max_pixels})
    rng = random.Random(6)
    for _ in range(100):
        height, width = (rng.randint(28, 3000) for _ in range(2))
        assert image_grid(height, width, IMAGE_LIMITS).num_patches == processor.get_number_of_image_patches(height, width)


def test_aspect_ratio_of_200_passes_and_more_does_not():
    assert smart_resize(2, 28, 5600, IMAGE_LIMITS) == _hf(2, 28, 5600, IMAGE_LIMITS)
    for height, width in ((28, 5601), (5601, 28)):
        assert _hf(2, height, width, IMAGE_LIMITS) is None
        with pytest.raises(ValueError, match=r"aspect ratio of .* is over 200"):
            smart_resize(2, height, width, IMAGE_LIMITS)


def test_one_frame_is_refused():
    assert _hf(1, 100, 100, IMAGE_LIMITS) is None
    with pytest.raises(ValueError, match="1 frames; at least 2"):
        smart_resize(1, 100, 100, IMAGE_LIMITS)
