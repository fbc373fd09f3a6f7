"""Is a picture or video what it says it is? Answered once, when its bytes are in hand, for every tool.

The kind is taken from the bytes, as the loader takes it; a picture with the wrong extension is kept and gets the right one. A
decoded picture leaves a small preview, which is all that scorers and hashes look at, so no tool decodes a second time.

Source: the kinds are those that nvidia-dali 2.4.0 decodes, and GIF, AVIF and JPEG 2000, which packing converts; pictures are
turned upright as transformers 5.23.0 does (image_utils.py, load_image); the limit on pixels is Pillow 13.0.0's
DecompressionBombError.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import av
import av.logging
from PIL import ExifTags, Image, ImageOps

from data_tools.corpus.faults import Fault
from data_tools.corpus.media import Kind, MediaRef, Record
from data_tools.corpus.reader import read_media
from data_tools.corpus.webdataset import EXTENSIONS
from megatron_glmv.data.media import MAX_PIXELS

PREVIEW = 256
"""Shorter side of a preview in pixels; the longer one is at most four times it."""
VIDEO_FRAMES = 4
Check = Literal["decode", "headers", "none"]
SAME = {"jpeg": "jpg", "tif": "tiff", "mov": "mp4", "webm": "mkv", "img": ""}
"""Extensions that say the same."""
STARTS = (
    ("jpg", b"\xff\xd8\xff"), ("png", b"\x89PNG\r\n\x1a\n"), ("bmp", b"BM"), ("gif", b"GIF8"), ("tiff", b"II*\x00"),
    ("tiff", b"MM\x00*"), ("jp2", b"\x00\x00\x00\x0cjP  "), ("mkv", b"\x1aE\xdf\xa3"),
)  # fmt: skip

warnings.simplefilter("ignore", Image.DecompressionBombWarning)
av.logging.set_level(None)


@dataclass(frozen=True)
class Medium:
    """A picture or video in memory.

    Attributes:
        kind: of its bytes, which is what its sample says.
        data: its bytes, untouched.
        extension: by its bytes.
        width: pixels, 0 when it was not looked at.
        height: pixels; of a picture upright, its EXIF orientation applied.
        previews: small RGB pictures: one of a picture, up to four of a video; none when it was not decoded.
        was_misnamed: its name has the extension of another kind.
    """

    kind: Kind
    data: bytes = field(repr=False)
    extension: str
    width: int = 0
    height: int = 0
    previews: tuple[Image.Image, ...] = field(default=(), repr=False)
    was_misnamed: bool = False


@dataclass(frozen=True)
class Loaded:
    """A sample with its media in memory; `position` counts within its chunk, what was dropped included."""

    record: Record
    media: tuple[Medium, ...]
    position: int


def load_record(record: Record, position: int, check: Check) -> Loaded:
    """Read and check the media of a sample.

    Raises:
        Fault: one that cannot be used.
    """
    return Loaded(record, tuple(check_medium(ref, read_media(ref), check) for ref in record.media), position)


def check_medium(ref: MediaRef, data: bytes, check: Check) -> Medium:
    """Look at the bytes of a medium.

    Args:
        ref: what the sample says.
        data: its bytes.
        check: "decode" a picture to its end and a few frames of a video, read the "headers", or "none": only the kind.

    Raises:
        Fault: of another kind, too many pixels, or it does not decode.
    """
    extension = sniff(data)
    named = ref.name.rpartition(".")[2].lower() if "." in ref.name else ""
    if EXTENSIONS.get(extension) != ref.kind:
        raise Fault(
            "media_wrong_type", f"{ref.name}: {extension or 'an unknown kind of file'}, not the {ref.kind} that it should be"
        )
    misnamed = named in EXTENSIONS and SAME.get(named, named) not in (SAME.get(extension, extension), "")
    if check == "none":
        return Medium(ref.kind, data, extension, was_misnamed=misnamed)
    if ref.kind == "image":
        width, height, previews = _look_at_picture(ref.name, data, check)
    else:
        width, height, previews = _look_at_video(ref.name, data, check)
    return Medium(ref.kind, data, extension, width, height, previews, misnamed)


def sniff(data: bytes) -> str:
    """The extension of the kind of file that starts with these bytes; empty for one that the loader does not read."""
    for extension, start in STARTS:
        if data.startswith(start):
            return "webm" if extension == "mkv" and b"webm" in data[:64] else extension
    if data[:4] == b"RIFF":
        return {b"WEBP": "webp", b"AVI ": "avi"}.get(data[8:12], "")
    if data[4:8] == b"ftyp":
        return {b"avif": "avif"}.get(data[8:12], "" if data[8:12] in (b"avis", b"heic", b"heix", b"mif1", b"msf1") else "mp4")
    return ""


def _look_at_picture(name: str, data: bytes, check: Check) -> tuple[int, int, tuple[Image.Image, ...]]:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
            _check_size(name, width, height)
            if check == "headers":
                # Of a PNG without EXIF data at its start Pillow would decode the pixels to look behind them.
                has_exif = picture.format in ("JPEG", "WEBP") or "exif" in picture.info
                turned = has_exif and picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
                return (height, width, ()) if turned else (width, height, ())
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return picture.width, picture.height, (shrink(picture),)
    except Fault:
        raise
    except Image.DecompressionBombError as error:
        raise Fault("image_bomb", f"{name}: {error}") from None
    except Exception as error:  # noqa: BLE001  (Pillow's decoders raise whatever their parser raises on broken bytes)
        raise Fault("image_broken", f"{name}: {str(error) or type(error).__name__}") from None


def _look_at_video(name: str, data: bytes, check: Check) -> tuple[int, int, tuple[Image.Image, ...]]:
    try:
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            _check_size(name, width, height)
            frames = () if check == "headers" else tuple(_sample_frames(container, stream))
    except Fault:
        raise
    except Exception as error:  # noqa: BLE001  (FFmpeg's errors have many classes)
        raise Fault("video_broken", f"{name}: {str(error) or type(error).__name__}") from None
    if check == "decode" and not frames:
        raise Fault("video_broken", f"{name}: no frame decodes")
    return width, height, frames


def _sample_frames(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[Image.Image]:
    """Frames at even distances, each the first that decodes behind the nearest key frame before its time."""
    duration = stream.duration or 0
    if not duration and container.duration and stream.time_base:  # Matroska gives the length of the whole only
        duration = int(container.duration / (av.time_base * stream.time_base))
    for number in range(VIDEO_FRAMES if duration else 1):
        target = (stream.start_time or 0) + duration * (2 * number + 1) // (2 * VIDEO_FRAMES)
        if duration:
            container.seek(target, stream=stream)
        for frame in container.decode(stream):
            if not duration or frame.pts is None or frame.pts >= target:
                yield shrink(frame.to_image())
                break


def shrink(picture: Image.Image) -> Image.Image:
    """A preview in RGB; a smaller picture keeps its size."""
    rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    scale = max(PREVIEW / min(rgb.size), 0.0)
    scale = min(scale, 4 * PREVIEW / max(rgb.size), 1.0)
    size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
    return rgb.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Fault("image_bomb", f"{name}: {width} x {height} pixels, the limit is {MAX_PIXELS} in all")
