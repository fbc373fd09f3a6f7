"""Decoding: equal to Hugging Face's image processor to the bit, and one bad picture harms no other.

DALI's decoders give Pillow's pixels and the resize is the kernel that torchvision calls, so the tests demand equality. They run
the CPU backend; decoding on a GPU (test_a_gpu_agrees) differs by what its own resize and JPEG decoder round.
"""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import pytest
import torch
from PIL import Image

from megatron_glmv.data.images import EncodedPicture, PictureDecoder
from megatron_glmv.data.media import MAX_PIXELS, BadMedia
from megatron_glmv.sequence.grid import PixelLimits, image_grid, smart_resize
from megatron_glmv.sequence.patches import cut_patches, join_frames, normalize_patches
from tests.data.pictures import broken, draw, encode, kinds

LIMITS = PixelLimits(min_pixels=12_544, max_pixels=2 * 600 * 800)
SHAPES = [(56, 224), (1, 40), (20, 3), (300, 900), (1100, 250), (35, 49), (448, 868), (800, 1100)]
"""(height, width): no resize, one pixel high, tiny, round up and down, upscale, downscale under the limit."""


@cache
def shaped(form: str = "PNG") -> dict[tuple[int, int], bytes]:
    return {size: encode(draw(*size, seed=size[1]), form) for size in SHAPES}


@pytest.fixture(scope="module")
def decoder() -> PictureDecoder:
    return PictureDecoder()


@pytest.fixture(scope="module")
def processor(torchvision_shim):
    from transformers import Glm4vImageProcessor

    return Glm4vImageProcessor(size={"shortest_edge": LIMITS.min_pixels, "longest_edge": LIMITS.max_pixels})


def encoded(data: bytes, *, known: bool = True) -> EncodedPicture:
    with Image.open(io.BytesIO(data)) as image:
        size = (image.height, image.width)
    return EncodedPicture(data, smart_resize(2, *size, LIMITS), size if known else None)


def pillow_pixels(data: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))


def doubled(patches: torch.Tensor) -> torch.Tensor:
    """Patches as the tower reads them, each picture in both places of its temporal patch."""
    return join_frames(patches, torch.tensor([[1, len(patches)]]), torch.tensor([False]))


def assert_equal_to_processor(decoder, processor, data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        theirs = processor(images=[image.convert("RGB")], return_tensors="pt")
        grid = image_grid(image.height, image.width, LIMITS)
    (patches,) = decoder.decode([encoded(data)])
    assert theirs["image_grid_thw"].tolist() == [[grid.frames, grid.rows, grid.columns]]
    assert patches.dtype == torch.uint8
    assert torch.equal(normalize_patches(doubled(patches), torch.float32), theirs["pixel_values"])


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_equals_the_image_processor(decoder, processor, kind):
    assert_equal_to_processor(decoder, processor, kinds()[kind])


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_every_shape_equals_the_image_processor(decoder, processor, size, form):
    assert_equal_to_processor(decoder, processor, shaped(form)[size])


def test_the_orientation_of_exif_is_not_applied(decoder):
    data = kinds(56, 84)["jpeg-rotated"]
    (patches,) = decoder.decode([EncodedPicture(data, (56, 84), (56, 84))])
    assert torch.equal(patches, cut_patches(pillow_pixels(data)))


def test_alpha_is_dropped_not_blended(decoder):
    data = kinds(56, 84)["png-rgba"]
    (patches,) = decoder.decode([EncodedPicture(data, (56, 84), (56, 84))])
    with Image.open(io.BytesIO(data)) as image:
        assert torch.equal(patches, cut_patches(torch.from_numpy(np.array(image)[:, :, :3].copy())))


def test_pictures_of_a_batch_do_not_depend_on_each_other(decoder):
    files = [*kinds().values(), *shaped().values()]
    together = decoder.decode([encoded(data) for data in files])
    alone = [decoder.decode([encoded(data)])[0] for data in files]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_threads_and_unknown_sizes_change_nothing(decoder):
    files = [*kinds().values(), *shaped().values()]
    threaded = PictureDecoder(num_threads=3)
    try:
        for known in (True, False):
            pictures = [encoded(data, known=known) for data in files]
            pairs = zip(threaded.decode(pictures), decoder.decode(pictures), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    finally:
        threaded.close()


def test_patches_outlive_the_next_call(decoder):
    """DALI hands out its own memory; what it decodes next must not show in patches given before."""
    first = decoder.decode([encoded(encode(draw(56, 112, seed)), known=False) for seed in range(3)])
    copies = [patches.clone() for patches in first]
    for seed in range(20):
        decoder.decode([encoded(encode(draw(56, 112, 50 + seed)))] * 3)
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))


@pytest.mark.parametrize("kind", broken())
@pytest.mark.parametrize("known", [True, False])
def test_a_bad_picture_is_named_and_its_neighbours_decode(decoder, kind, known):
    good = [encoded(data) for data in list(kinds().values())[:4]]
    bad = EncodedPicture(broken()[kind], (56, 112), (60, 100) if known else None)
    results = decoder.decode([*good[:2], bad, *good[2:]])
    assert isinstance(results[2], BadMedia)
    assert results[2].reason
    assert "\n" not in results[2].reason
    alone = decoder.decode(good)
    assert all(torch.equal(a, b) for a, b in zip(results[:2] + results[3:], alone, strict=True))
    # The decoder is not harmed either.
    assert all(isinstance(result, torch.Tensor) for result in decoder.decode(good))


def test_reasons_say_what_is_wrong(decoder):
    reasons = {kind: decoder.decode([EncodedPicture(data, (56, 112))])[0].reason for kind, data in broken().items()}
    assert "not in a format that DALI reads" in reasons["text"]
    assert "not in a format that DALI reads" in reasons["gif"]
    assert "damaged" in reasons["jpeg-half"]
    assert "end early" in reasons["png-half"]


def test_many_bad_pictures_in_one_batch(decoder):
    files = [data for pair in zip(broken().values(), list(kinds().values())[:8], strict=True) for data in pair]
    results = decoder.decode([EncodedPicture(data, (56, 112)) for data in files])
    assert [isinstance(result, BadMedia) for result in results] == [True, False] * 8


def png_that_claims(height: int, width: int) -> bytes:
    """A PNG of a few bytes whose header claims a huge picture."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(100))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def test_a_claim_of_too_many_pixels_is_refused_before_decoding(decoder):
    side = int(MAX_PIXELS**0.5) + 1
    good = encoded(encode(draw(56, 112)))
    for size in (None, (side, side)):
        results = decoder.decode([good, EncodedPicture(png_that_claims(side, side), (56, 56), size)])
        assert results[1] == BadMedia(f"{side} x {side} pixels are over the limit of {MAX_PIXELS}")
        assert isinstance(results[0], torch.Tensor)


def test_another_size_than_measured_is_a_fault(decoder):
    data = encode(draw(56, 112))
    results = decoder.decode([EncodedPicture(data, (56, 112), (56, 112)), EncodedPicture(data, (56, 112), (112, 56))])
    assert isinstance(results[0], torch.Tensor)
    assert results[1] == BadMedia("decodes to 56 x 112 pixels, 112 x 56 were measured")


def test_dalis_pixels_are_freed_with_their_pictures(decoder, alive):
    before = alive(ndd.Batch)
    for known in (True, False):
        pictures = [encoded(data, known=known) for data in shaped().values()]
        assert all(isinstance(result, torch.Tensor) for result in decoder.decode(pictures))
        decoder.decode([*pictures[:2], EncodedPicture(broken()["jpeg-half"], (56, 112))])
    assert alive(ndd.Batch) == before


def test_nothing_to_decode(decoder):
    assert decoder.decode([]) == []


@pytest.mark.gpu
def test_a_gpu_agrees():
    """A GPU's resize is float and its JPEG decoder rounds on its own: twice the differences measured for DALI on the CPU."""
    gpu, cpu = PictureDecoder("gpu"), PictureDecoder()
    files = [*kinds().values(), *shaped().values()]
    pictures = [encoded(data) for data in files]
    for ours, theirs in zip(gpu.decode(pictures), cpu.decode(pictures), strict=True):
        difference = (ours.cpu().int() - theirs.int()).abs()
        assert difference.float().mean() < 1.0
        assert difference.max() <= 32
    bad = gpu.decode([pictures[0], EncodedPicture(broken()["jpeg-half"], (56, 112)), pictures[1]])
    assert [isinstance(result, BadMedia) for result in bad] == [False, True, False]
