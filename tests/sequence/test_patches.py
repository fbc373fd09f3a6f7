"""Patches: the order and the values that Hugging Face's image processor gives, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_glmv.sequence.patches import cut_patches, join_frames, normalize_patches, num_flat_patches, patchify


def test_order_of_patches_and_of_the_values_in_them():
    """Each pixel holds its own address, so any swap shows."""
    rows, columns, patch = 4, 6, 14
    picture = torch.arange(rows * patch * columns * patch * 3, dtype=torch.int32).reshape(rows * patch, columns * patch, 3)
    patches = patchify(picture)
    assert patches.shape == (rows * columns, 3 * 2 * patch * patch)
    for index in range(rows * columns):
        block, inside = divmod(index, 4)
        row = block // (columns // 2) * 2 + inside // 2
        column = block % (columns // 2) * 2 + inside % 2
        cut = picture[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].permute(2, 0, 1)
        assert torch.equal(patches[index].view(3, 2, patch, patch), cut[:, None].expand(3, 2, patch, patch))


@pytest.mark.parametrize("size", [(28, 29), (14, 28), (42, 56)])
def test_sizes_that_cannot_be_cut(size):
    with pytest.raises(ValueError, match="blocks of 28 pixels"):
        patchify(torch.zeros(*size, 3))


def test_equal_to_the_image_processor(torchvision_shim):
    from transformers import Glm4vImageProcessor

    picture = np.random.default_rng(0).integers(0, 256, (112, 84, 3), dtype=np.uint8)
    theirs = Glm4vImageProcessor(do_resize=False)(images=[torch.from_numpy(picture).permute(2, 0, 1)], return_tensors="pt")
    ours = normalize_patches(patchify(torch.from_numpy(picture)), torch.float32)
    assert torch.equal(ours, theirs["pixel_values"])


def test_every_byte_in_every_channel():
    patches = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, -1)
    before = patches.clone()
    values = normalize_patches(patches, torch.float32).view(3, 256)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    exact = (np.arange(256) / 255 - mean[:, None]) / std[:, None]
    assert np.abs(values.numpy() - exact).max() < 5e-7
    assert torch.equal(patches, before)


def test_kinds_of_result():
    patches = torch.full((3, 1176), 200, dtype=torch.uint8)
    exact = normalize_patches(patches, torch.float32)
    assert torch.equal(normalize_patches(patches, torch.bfloat16), exact.to(torch.bfloat16))
    assert normalize_patches(patches[:0], torch.float32).shape == (0, 1176)


def test_frames_are_joined_in_their_order():
    """Every row holds its own number, so any other pairing shows."""
    frames, moving = torch.tensor([[2, 2], [2, 4], [2, 2], [2, 2]]), torch.tensor([False, True, False, True])
    rows = num_flat_patches(frames, moving)
    assert rows == 4 + 2 * 8 + 4 + 2 * 4
    flat = (1000 * torch.arange(rows))[:, None] + torch.arange(3 * 5)
    joined = join_frames(flat, frames, moving).view(-1, 3, 2, 5).transpose(2, 3).transpose(1, 2)
    first = [*range(4), *range(4, 12), *range(20, 24), *range(24, 28)]
    second = [*range(4), *range(12, 20), *range(20, 24), *range(28, 32)]
    assert torch.equal(joined[..., 0], flat.view(-1, 5, 3)[first])
    assert torch.equal(joined[..., 1], flat.view(-1, 5, 3)[second])


def test_flat_patches_join_to_those_of_the_processor():
    picture = torch.arange(56 * 84 * 3, dtype=torch.int32).reshape(56, 84, 3)
    flat = cut_patches(picture)
    assert torch.equal(join_frames(flat, torch.tensor([[4, 6]]), torch.tensor([False])), patchify(picture))
    out = torch.zeros(40, 588, dtype=torch.int32)
    assert cut_patches(picture.flip(0).flip(0), out=out[8:32]).data_ptr() == out[8:].data_ptr()
    assert torch.equal(out[8:32], flat)
    assert not out[:8].any()
    with pytest.raises(ValueError, match="blocks of 28 pixels"):
        cut_patches(picture[:29])


def test_rows_without_pictures_join_to_nothing():
    nothing = join_frames(
        torch.empty(0, 588, dtype=torch.uint8), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, dtype=torch.bool)
    )
    assert nothing.shape == (0, 1176)
