"""Small pictures of the media of packed rows and of files, decoded with Pillow and PyAV, as data that a page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import av
from PIL import Image, ImageOps

from megatron_glmv.data.media import Media

SIDE = 112
"""Longer side in pixels; about three kilobytes."""
MAX_FRAMES = 8
"""Frames shown of a video."""
FILE_SIDE, FILE_FRAMES = 224, 6
"""The same of a picture or video file."""
VIDEOS = ("mp4", "mkv", "webm", "mov", "avi")


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


def draw_file(path: Path) -> list[tuple[str, str]]:
    """Small pictures of a picture or video file, as `draw_thumbnails`; a file that is not there is said to be missing."""
    if not path.is_file():
        return [("missing", "")]
    try:
        if path.suffix.lower().removeprefix(".") in VIDEOS:
            return _draw_video(path)
        with Image.open(path) as picture:
            size = f"{picture.width} × {picture.height}"
            picture.draft("RGB", (2 * FILE_SIDE, 2 * FILE_SIDE))
            return [(size, _encode(ImageOps.exif_transpose(picture), FILE_SIDE))]
    except Exception as error:  # noqa: BLE001  (decoders raise whatever their parser raises on broken bytes)
        return [(f"does not decode: {str(error) or type(error).__name__}"[:120], "")]


def _draw_video(path: Path) -> list[tuple[str, str]]:
    """Frames at even times, each sought, so that a long video costs no more than a short one."""
    found: dict[float, str] = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        duration = (container.duration or 0) / av.time_base
        for number in range(FILE_FRAMES if duration else 1):
            target = duration * number / FILE_FRAMES
            container.seek(int(target * av.time_base))
            for frame in container.decode(stream):
                if (time := frame.time or 0.0) >= target - 1e-3:
                    found.setdefault(round(time, 2), _encode(frame.to_image(), SIDE))
                    break
    return [(f"{time:g} s", uri) for time, uri in sorted(found.items())] or [("no frame decodes", "")]


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


def _encode(picture: Image.Image, side: int = SIDE) -> str:
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=72)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
