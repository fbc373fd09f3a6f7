"""Picture files before they are packed: their size as transformers sees it, and the few that DALI reads otherwise, converted.

Decided when a data set is packed, so that the loader finds only files that decode alike everywhere: a picture's EXIF
orientation becomes a number of its entry, and a GIF, an AVIF or a picture of 16 bits a channel becomes the PNG of what Pillow
makes of it.

Source: transformers 5.23.0, image_utils.py (`load_image`: upright, then `convert("RGB")`); Pillow 13.0.0, ImageOps.
"""

from __future__ import annotations

import io

from PIL import ExifTags, Image, ImageOps

from megatron_glmv.data.media import MAX_PIXELS, Picture

KEPT = {
    "JPEG": ("L", "RGB", "CMYK"),
    "MPO": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("L", "P", "RGB"),
    "TIFF": ("L", "RGB"),
}
"""Formats and modes that DALI decodes to Pillow's pixels; all else is converted."""
PNG_DEPTH = 24
"""Byte of a PNG that holds its bits a channel."""


class PictureError(ValueError):
    """A picture that cannot be read; the message says why, and not which."""


def prepare_picture(data: bytes, extension: str, *, upright: bool = True, decode: bool = True) -> Picture:
    """A picture as it goes into a data set.

    Args:
        data: contents of a file; the format is found from them, whatever the file is called.
        extension: of the file, without the dot.
        upright: turn it by its EXIF orientation, as transformers does with a path or address; else take it as it is stored.
        decode: also decode it in full, which finds files that are damaged behind their header.

    Returns:
        The untouched bytes with the size and turn that the loader applies, or a PNG where DALI would give other pixels.

    Raises:
        PictureError: no picture that Pillow reads, one that is damaged, or one of more than MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise PictureError(f"{height} x {width} pixels are over the limit of {MAX_PIXELS}")
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            # Pillow turns TIFF on its own, always; DALI never.
            differs = (image.format == "PNG" and data[PNG_DEPTH] > 8) or (image.format == "TIFF" and orientation != 1)
            if image.mode not in KEPT.get(image.format or "", ()) or differs:
                return _converted(image, upright)
            if decode:
                image.load()
    except PictureError:
        raise
    except Exception as error:  # noqa: BLE001  (Pillow's decoders raise whatever their parser raises on broken bytes)
        raise PictureError(str(error) or type(error).__name__) from None
    if not upright or orientation not in range(2, 9):
        return Picture(data, extension, height, width)
    turned = (width, height) if orientation >= 5 else (height, width)
    return Picture(data, extension, *turned, orientation)


def _converted(image: Image.Image, upright: bool) -> Picture:
    pixels = (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    buffer = io.BytesIO()
    pixels.save(buffer, "PNG", compress_level=1)
    return Picture(buffer.getvalue(), "png", pixels.height, pixels.width)
