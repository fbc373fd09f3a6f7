"""Small pictures of the media of packed rows, decoded with Pillow and PyAV, as data that a page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import av
from PIL import Image, ImageOps

from megatron_glmv.data.media import Media

SIDE = 112
"""Longer side in pixels; about three kilobytes."""
MAX_FRAMES = 8
"""Frames shown of a video."""


def draw_thumbnails(media: Media, data: bytes) -> list[tuple[str, str]]:
    """Small pictures of one medium.

    Args:
        media: its entry.
        data: its bytes.

    Returns:
        (caption, data: URI) of a picture, or of up to MAX_FRAMES planned frames of a video; the URI is empty, and the caption
        says why, where it does not decode.
    """
    try:
        if media.kind == "video":
            return _draw_frames(data, media.frame_indices)
        with Image.open(io.BytesIO(data)) as picture:
            size = f"{media.width} × {media.height}"
            picture.draft("RGB", (2 * SIDE, 2 * SIDE))
            upright = ImageOps.exif_transpose(picture) if media.orientation != 1 else picture
            return [(size, _encode(upright))]
    except Exception as error:  # noqa: BLE001  (decoders raise whatever their parser raises on broken bytes)
        return [(f"does not decode: {str(error) or type(error).__name__}"[:120], "")]


def _draw_frames(data: bytes, indices: Sequence[int]) -> list[tuple[str, str]]:
    starts = list(dict.fromkeys(indices[::2]))
    step = max(1, -(-len(starts) // MAX_FRAMES))
    wanted = set(starts[::step])
    found = []
    with av.open(io.BytesIO(data)) as container:
        for index, frame in enumerate(container.decode(container.streams.video[0])):
            if index in wanted:
                found.append((f"frame {index}", _encode(frame.to_image())))
                wanted.remove(index)
            if not wanted:
                break
    return found or [("no frame decodes", "")]


def _encode(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=72)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
