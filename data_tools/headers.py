"""What a picture or video will be in a row, from its header alone: size, orientation, grid, frames.

Packing a million samples opens a million files; decoding them would take hours, their headers take a minute. A file that ends
early is found without decoding as well: the end of its format is looked for where it should stand, and only a picture that has
it elsewhere is decoded.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_tools.corpus.checks import check_medium, sniff
from data_tools.corpus.faults import Fault
from data_tools.corpus.media import MediaRef, Place, read_bytes
from data_tools.corpus.webdataset import EXTENSIONS
from megatron_glmv.data.chat import Chat
from megatron_glmv.data.picture_files import BombError, PictureError, convert_picture, read_picture_header
from megatron_glmv.data.videos import VideoError, VideoPlan, plan_video, read_video_header
from megatron_glmv.sequence.grid import Grid, image_grid

START = 64
"""Bytes that tell the kind of a file."""
CONVERTED = {"gif": (0, b"GIF8"), "avif": (4, b"ftypavif"), "jp2": (0, b"\x00\x00\x00\x0cjP  ")}
"""Pictures that the loader does not read, but Pillow: where what stands that tells them; they are decoded and converted."""
ENDS = {"jpg": (b"\xff\xd9", 4096), "png": (b"IEND", 4096)}
"""What stands near the end of a complete file, and in how many bytes; cameras write a little behind it, phones a video."""


@dataclass(frozen=True)
class PackedMedium:
    """A picture or video as a row needs it.

    Attributes:
        kind: image or video.
        name: as the sample calls it.
        place: where its bytes are.
        extension: by its bytes.
        height: of the decoded picture, turned, or of a frame as coded; pixels.
        width: pixels.
        orientation: of a picture.
        frame_indices: of a video.
        converted: a picture that DALI reads otherwise than transformers goes into the row as a PNG.
    """

    kind: str
    name: str
    place: Place
    extension: str
    height: int
    width: int
    orientation: int = 1
    frame_indices: tuple[int, ...] = ()
    converted: bool = False


def plan_medium(ref: MediaRef, chat: Chat, decode: bool = False) -> tuple[PackedMedium, Grid | VideoPlan]:
    """Measure a picture or video.

    Args:
        ref: of a sample; its bytes, a file or a range of one.
        chat: limits of the processor.
        decode: decode a picture to its end, and some frames of a video, to check them.

    Raises:
        Fault: it is missing, damaged, too large, too narrow, or of another kind.
    """
    try:
        with _open(ref) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            start = file.read(START)
            extension = sniff(start) or _sniff_converted(start)
            if not size:
                raise Fault("media_empty", ref.name)
            if ("image" if extension in CONVERTED else EXTENSIONS.get(extension)) != ref.kind:
                raise Fault("media_wrong_type", f"{ref.name}: {extension or 'an unknown kind of file'}, no {ref.kind}")
            if decode and extension not in CONVERTED:
                check_medium(ref, read_bytes(ref), "decode")
            file.seek(0)
            measure = _measure_video if ref.kind == "video" else _measure_picture
            return measure(ref, file, extension, size, chat)
    except FileNotFoundError:
        raise Fault("media_missing", ref.place.path) from None
    except OSError as error:
        raise Fault("file_unreadable", f"{ref.place.path} ({error})") from None


def _measure_picture(
    ref: MediaRef, file: BinaryIO, extension: str, size: int, chat: Chat
) -> tuple[PackedMedium, Grid | VideoPlan]:
    try:
        header = read_picture_header(file)
        if header.converted:
            file.seek(0)
            convert_picture(file.read())
    except BombError as error:
        raise Fault("image_bomb", f"{ref.name}: {error}") from None
    except PictureError as error:
        raise Fault("image_broken", f"{ref.name}: {error}") from None
    _check_end(ref, file, extension, size)
    try:
        grid = image_grid(header.height, header.width, chat.image.limits, chat.image.patch_size)
    except ValueError as error:
        raise Fault("image_too_narrow", f"{ref.name}: {error}") from None
    measured = (header.height, header.width, header.orientation)
    return PackedMedium("image", ref.name, ref.place, extension, *measured, converted=header.converted), grid


def _sniff_converted(start: bytes) -> str:
    return next((name for name, (at, mark) in CONVERTED.items() if start[at : at + len(mark)] == mark), "")


def _check_end(ref: MediaRef, file: BinaryIO, extension: str, size: int) -> None:
    """A file cut off behind its header looks whole until it is decoded."""
    if extension in ENDS:
        mark, reach = ENDS[extension]
        file.seek(max(0, size - reach))
        if mark in file.read(reach):
            return
        data = read_bytes(ref)
        if mark not in data:
            raise Fault("image_broken", f"{ref.name}: it ends early")
        check_medium(ref, data, "decode")  # the mark may be that of a thumbnail in a file that was cut off
    elif extension == "webp":
        file.seek(4)
        if int.from_bytes(file.read(4), "little") + 8 > size:
            raise Fault("image_broken", f"{ref.name}: it ends early")


def _measure_video(
    ref: MediaRef, file: BinaryIO, extension: str, size: int, chat: Chat
) -> tuple[PackedMedium, Grid | VideoPlan]:
    del size
    try:
        header = read_video_header(Path(ref.place.path) if ref.place.holder == "file" and ref.data is None else file.read())
        plan = plan_video(header, chat.video)
    except VideoError as error:
        raise Fault("video_broken", f"{ref.name}: {error}") from None
    except ValueError as error:
        raise Fault("image_too_narrow", f"{ref.name}: {error}") from None
    medium = PackedMedium("video", ref.name, ref.place, extension, header.height, header.width, 1, plan.frame_indices)
    return medium, plan


def _open(ref: MediaRef) -> BinaryIO:
    if ref.data is not None:
        return io.BytesIO(ref.data)
    if ref.place.holder == "range":
        return io.BufferedReader(_Range(ref.place))
    return Path(ref.place.path).open("rb")


class _Range(io.RawIOBase):
    """A range of a file as a file of its own; nothing is read ahead, so a header in a tar costs what a header costs."""

    def __init__(self, place: Place) -> None:
        self._file = Path(place.path).open("rb", buffering=0)  # noqa: SIM115  (closed with this object)
        self._start, self._size, self._at = place.offset, place.size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
