"""Real encoded pictures of every kind that the decoder meets, made by the tests."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image


def draw(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """[height, width, 3] soft colour fields with sharp strokes and a little noise, like a photo of a page."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 32), max(2, width // 32), 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    for _ in range(6):
        top, left = int(rng.integers(0, height)), int(rng.integers(0, width))
        picture[top : top + max(1, height // 20), left : left + max(1, width // 4)] = rng.integers(0, 256, 3)
    return np.clip(picture + rng.integers(-6, 7, picture.shape), 0, 255).astype(np.uint8)


def encode(picture: npt.NDArray[np.uint8] | Image.Image, form: str = "PNG", **options: object) -> bytes:
    """The bytes of a picture file."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rotated_exif(orientation: int = 6) -> Image.Exif:
    """EXIF data that ask the viewer to turn the picture."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@cache
def kinds(height: int = 60, width: int = 100) -> dict[str, bytes]:
    """One file of every kind that decodes."""
    image = Image.fromarray(draw(height, width))
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, width, dtype=np.uint8), (height, 1))))
    return {
        "png": encode(image),
        "png-rgba": encode(alpha),
        "png-grey": encode(image.convert("L")),
        "png-grey-alpha": encode(alpha.convert("LA")),
        "png-palette": encode(image.quantize(64)),
        "png-one-bit": encode(image.convert("1")),
        "jpeg": encode(image, "JPEG", quality=90),
        "jpeg-444": encode(image, "JPEG", quality=90, subsampling=0),
        "jpeg-progressive": encode(image, "JPEG", progressive=True),
        "jpeg-grey": encode(image.convert("L"), "JPEG"),
        "jpeg-cmyk": encode(image.convert("CMYK"), "JPEG"),
        "jpeg-rotated": encode(image, "JPEG", exif=rotated_exif()),
        "webp": encode(image, "WEBP"),
        "webp-lossless-alpha": encode(alpha, "WEBP", lossless=True),
        "bmp": encode(image, "BMP"),
        "tiff": encode(image, "TIFF"),
    }


@cache
def broken() -> dict[str, bytes]:
    """One file of every kind that does not decode."""
    picture = draw(60, 100)
    png, jpeg = encode(picture), encode(picture, "JPEG")
    return {
        "empty": b"",
        "text": b"<html><body>404 not found</body></html>",
        "noise": np.random.default_rng(0).bytes(3_000),
        "png-half": png[: len(png) // 2],
        "jpeg-half": jpeg[: len(jpeg) // 2],
        "jpeg-end-missing": jpeg[:-2],
        "jpeg-header-only": jpeg[:20],
        "gif": encode(picture, "GIF"),
    }
