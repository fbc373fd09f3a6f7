"""Picture files before they are packed: their size as transformers sees it, and which of them DALI reads otherwise.

Decided when a data set is packed, so that the loader finds only files that decode alike everywhere: a picture's EXIF
orientation becomes a number of its entry, and a GIF, an AVIF or a picture of 16 bits a channel or pixel becomes the PNG of what
Pillow makes of it.

Source: transformers 5.23.0, image_utils.py (`load_image`: upright, then `convert("RGB")`); Pillow 13.0.0, ImageOps.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import BinaryIO

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from megatron_glmv.data.media import MAX_PIXELS, Picture

KEPT = {
    "JPEG": ("L", "RGB", "CMYK"),
    "MPO": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("L", "P", "RGB"),
    "TIFF": ("L", "RGB"),
}
"""Formats and modes that DALI decodes to Pillow's pixels, but for what `_differs` names; all else is converted."""
Image.init()
FORMATS = tuple(form for form in (*KEPT, "GIF", "AVIF", "JPEG2000", "PPM", "ICO") if form in Image.OPEN)
"""Formats that Pillow may take a file for, some of which it would otherwise hand to other programs."""
PNG_SIGNATURE, PNG_DEPTH = 8, 24
"""Bytes of a PNG before its chunks, and the one that holds its bits a channel."""
BMP_HEADER, BMP_DEPTH, BMP_OLD_DEPTH = 14, 28, 24
"""Bytes of a BMP that hold its header's length and its bits a pixel, which in the oldest header of 12 bytes stand elsewhere."""


class PictureError(ValueError):
    """A picture that cannot be read; the message says why, and not which."""


class NoPictureError(PictureError):
    """Something else than a picture."""


class BombError(PictureError):
    """A picture of more pixels than anyone wants to decode."""


@dataclass(frozen=True)
class PictureHeader:
    """What is known of a picture before it is decoded.

    Attributes:
        height: pixels, turned.
        width: pixels.
        orientation: EXIF's number of the turn that the loader applies, 1 for none.
        converted: DALI would give other pixels: `convert_picture` makes what is packed.
        form: of the file, as Pillow calls it, in small letters.
    """

    height: int
    width: int
    orientation: int = 1
    converted: bool = False
    form: str = ""


def read_picture_header(file: BinaryIO, *, upright: bool = True) -> PictureHeader:
    """A picture's size and turn; decodes nothing.

    Args:
        file: at its start; the format is found from the contents.
        upright: turn it by its EXIF orientation, as transformers does with a path or address; else take it as it is stored.

    Raises:
        NoPictureError: nothing that Pillow takes for a picture of FORMATS.
        PictureError: a damaged header.
        BombError: one of more than MAX_PIXELS.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            orientation = _orientation(image, file)
            is_kept = image.mode in KEPT.get(image.format or "", ()) and not _differs(image, file, orientation)
            form = image.format or ""
    except UnidentifiedImageError:
        raise NoPictureError("no picture") from None
    except Image.DecompressionBombError as error:
        raise BombError(str(error)) from None
    except Exception as error:  # noqa: BLE001  (Pillow's readers raise whatever their parser raises on broken bytes)
        raise PictureError(str(error) or type(error).__name__) from None
    if width * height > MAX_PIXELS:
        raise BombError(f"{height} x {width} pixels are over the limit of {MAX_PIXELS}")
    if not upright or form == "TIFF":
        orientation = 1
    if orientation >= 5:
        height, width = width, height
    return PictureHeader(height, width, orientation if is_kept else 1, not is_kept, form.lower())


def convert_picture(data: bytes, *, upright: bool = True) -> bytes:
    """The PNG of what transformers makes of a picture; of an animation the first frame.

    Raises:
        PictureError: the picture is damaged.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except Exception as error:  # noqa: BLE001  (as above)
        raise PictureError(str(error) or type(error).__name__) from None
    buffer = io.BytesIO()
    pixels.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def prepare_picture(data: bytes, extension: str, *, upright: bool = True) -> Picture:
    """A picture as it goes into a data set: its untouched bytes, or a PNG where DALI would give other pixels.

    Args:
        data: contents of a file.
        extension: of the file, without the dot.
        upright: as for `read_picture_header`.

    Raises:
        PictureError: as `read_picture_header` and `convert_picture`.
    """
    header = read_picture_header(io.BytesIO(data), upright=upright)
    if header.converted:
        return Picture(convert_picture(data, upright=upright), "png", header.height, header.width)
    return Picture(data, extension, header.height, header.width, header.orientation)


def _differs(image: Image.Image, file: BinaryIO, orientation: int) -> bool:
    """A file of a kept format and mode that DALI reads otherwise.

    Deep PNGs; TIFFs, which Pillow turns on its own; BMPs of 16 bits a pixel; CMYK without the marker that says how it is meant.
    """
    if image.format == "TIFF":
        return orientation != 1
    if image.format == "BMP":
        is_old = _number(file, BMP_HEADER, 4) == 12
        return _number(file, BMP_OLD_DEPTH if is_old else BMP_DEPTH, 2) == 16
    if image.format == "PNG":
        return _number(file, PNG_DEPTH, 1) > 8
    return image.mode == "CMYK" and "adobe" not in image.info


def _number(file: BinaryIO, place: int, size: int) -> int:
    """The little-endian number of `size` bytes at `place`."""
    file.seek(place)
    return int.from_bytes(file.read(size), "little")


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    """EXIF's number, 1 where there is none that means anything.

    Pillow would decode a whole PNG to look for EXIF data behind its pixels; so it is only asked where there are any.
    """
    if image.format == "PNG" and "exif" not in image.info and not _png_has(file, b"eXIf", b"iTXt"):
        return 1
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _png_has(file: BinaryIO, *kinds: bytes) -> bool:
    """Whether a PNG has a chunk of one of these kinds; reads the heads of chunks only."""
    place = PNG_SIGNATURE
    while True:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return False
        if head[4:] in kinds:
            return True
        place += 12 + int.from_bytes(head[:4], "big")
