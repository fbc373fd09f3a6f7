"""Picture files of every kind: what is packed decodes to the pixels that transformers makes of the file's path."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_glmv.data.images import EncodedPicture, PictureDecoder, turn
from megatron_glmv.data.media import MAX_PIXELS
from megatron_glmv.data.picture_files import BombError, PictureError, prepare_picture, read_picture_header
from megatron_glmv.sequence.grid import PixelLimits, smart_resize
from megatron_glmv.sequence.patches import join_frames, normalize_patches
from tests.data.pictures import broken, draw, encode, kinds, rotated_exif

LIMITS = PixelLimits()


def png_of_16_bits(channels: int) -> bytes:
    """A PNG with values that 8 bits do not hold."""
    values = np.random.default_rng(1).integers(0, 65_536, (40, 50, channels), dtype=np.uint16).astype(">u2")
    lines = b"".join(b"\0" + line.tobytes() for line in values)
    header = struct.pack(">IIBBBBB", 50, 40, 16, 2 if channels == 3 else 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def bmp_of_16_bits(green: int, header: int = 40) -> bytes:
    """A BMP with 5, `green` and 5 bits a colour, under a header of 12 or 40 bytes."""
    pixels = np.random.default_rng(2).integers(0, 2 ** (10 + green), (40, 50)).astype("<u2").tobytes()
    if header == 12:
        fields = struct.pack("<IHHHH", 12, 50, 40, 1, 16)
    else:
        fields = struct.pack("<IiiHHIIiiII", 40, 50, 40, 1, 16, 3 if green == 6 else 0, len(pixels), 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F) if green == 6 else b""
    start = 14 + len(fields) + len(masks)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + fields + masks + pixels


def without_adobe(jpeg: bytes) -> bytes:
    """A JPEG without the marker by which Adobe says what its channels are."""
    start = jpeg.index(b"\xff\xee")
    assert jpeg[start + 4 : start + 9] == b"Adobe"
    return jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big") :]


def files() -> dict[str, bytes]:
    picture = Image.fromarray(draw(60, 100))
    second = Image.fromarray(draw(60, 100, seed=9))
    turned = {f"jpeg-turned-{number}": encode(picture, "JPEG", exif=rotated_exif(number)) for number in range(1, 10)}
    return kinds() | turned | {
        "png-turned": encode(picture, "PNG", exif=rotated_exif(6)),
        "webp-turned": encode(picture, "WEBP", exif=rotated_exif(5), lossless=True),
        "tiff-turned": encode(picture, "TIFF", exif=rotated_exif(8)),
        "gif-animated": encode(picture, "GIF", save_all=True, append_images=[second], duration=40),
        "webp-animated": encode(picture, "WEBP", save_all=True, append_images=[second], duration=40, lossless=True),
        "png-16-rgb": png_of_16_bits(3),
        "png-16-grey": png_of_16_bits(1),
        "tiff-16-grey": encode(Image.fromarray(draw(60, 100)[:, :, 0].astype(np.uint16) * 200), "TIFF"),
        "tiff-float": encode(Image.fromarray(draw(60, 100)[:, :, 0].astype(np.float32)), "TIFF"),
        "jpeg-cmyk-unmarked": without_adobe(kinds()["jpeg-cmyk"]),
        "bmp-555": bmp_of_16_bits(5),
        "bmp-565": bmp_of_16_bits(6),
        "bmp-555-old": bmp_of_16_bits(5, header=12),
        "tiff-cmyk": encode(picture.convert("CMYK"), "TIFF"),
        "ppm": encode(picture, "PPM"),
        "ico": encode(picture, "ICO"),
    }  # fmt: skip


FILES = files()


@pytest.fixture(scope="module")
def decoder() -> PictureDecoder:
    return PictureDecoder()


@pytest.fixture(scope="module")
def processor(torchvision_shim):
    from transformers import Glm4vImageProcessor

    return Glm4vImageProcessor(size={"shortest_edge": LIMITS.min_pixels, "longest_edge": LIMITS.max_pixels})


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("upright", [True, False])
def test_a_packed_file_equals_the_image_processor(decoder, processor, tmp_path, kind, upright):
    """Upright, against the processor's own way from a path; else against the stored pixels."""
    from transformers.image_utils import load_image

    (tmp_path / "a").write_bytes(FILES[kind])
    with Image.open(tmp_path / "a") as image:
        theirs = load_image(str(tmp_path / "a")) if upright else image.convert("RGB")
    expected = processor(images=[theirs], return_tensors="pt")
    picture = prepare_picture(FILES[kind], "x", upright=upright)
    assert (picture.height, picture.width) == (theirs.height, theirs.width)
    size = (picture.height, picture.width)
    (patches,) = decoder.decode([EncodedPicture(picture.data, smart_resize(2, *size, LIMITS), size, picture.orientation)])
    patches = join_frames(patches, torch.tensor([[1, len(patches)]]), torch.tensor([False]))
    assert torch.equal(normalize_patches(patches, torch.float32), expected["pixel_values"])


def test_files_that_need_no_change_stay_as_they_are():
    for kind, data in kinds().items():
        assert prepare_picture(data, "x").data is data, kind
    assert prepare_picture(FILES["jpeg-turned-6"], "jpg").orientation == 6
    assert prepare_picture(FILES["jpeg-turned-6"], "jpg", upright=False).orientation == 1
    assert prepare_picture(FILES["gif-animated"], "gif").extension == "png"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turns_are_those_of_pillow(orientation):
    pixels = draw(5, 7)
    with Image.open(io.BytesIO(encode(pixels, exif=rotated_exif(orientation)))) as image:
        from PIL import ImageOps

        expected = np.array(ImageOps.exif_transpose(image))
    assert np.array_equal(turn(torch.from_numpy(pixels), orientation).numpy(), expected)


@pytest.mark.parametrize("kind", ["empty", "text", "noise", "jpeg-header-only"])
def test_a_broken_file_is_refused(kind):
    with pytest.raises(PictureError):
        prepare_picture(broken()[kind], "jpg")


def test_a_broken_file_that_must_be_converted_is_refused():
    data = png_of_16_bits(3)
    with pytest.raises(PictureError):
        prepare_picture(data[: len(data) // 2], "png")


def test_a_header_is_read_without_decoding():
    """The same for a file whose pixels are noise, with EXIF data before and behind them."""
    for kind in ("png-turned", "png", "jpeg-turned-5", "webp-turned"):
        data = FILES[kind]
        header = read_picture_header(io.BytesIO(data))
        picture = prepare_picture(data, "x")
        assert (header.height, header.width, header.orientation) == (picture.height, picture.width, picture.orientation)
    data = FILES["png-turned"]
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    behind = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert read_picture_header(io.BytesIO(behind)).orientation == 6


def test_a_bomb_is_refused_before_it_is_decoded():
    side = int(MAX_PIXELS**0.5) + 1
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    with pytest.raises(BombError, match="pixels"):
        prepare_picture(data + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")), "png")
