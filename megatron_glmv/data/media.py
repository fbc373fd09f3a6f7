"""Pictures and videos as they go into a shard and as a row's JSON lists them.

A field that was added later has a value that leaves it out of the JSON, so that data sets packed before read as they did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

MAX_PIXELS = 178_956_970
"""A picture that claims more pixels is not decoded: the bound at which Pillow 13.0.0 raises DecompressionBombError."""


@dataclass(frozen=True)
class Picture:
    """The bytes of one picture on its way into a shard.

    Attributes:
        data: the file's bytes, untouched.
        extension: of the file, without the dot.
        height: pixels, after turning by `orientation`.
        width: pixels.
        orientation: EXIF's number of the turn to apply after decoding, 1 for none.
    """

    data: bytes
    extension: str
    height: int
    width: int
    orientation: int = 1


@dataclass(frozen=True)
class Clip:
    """The bytes of one video on its way into a shard.

    Attributes:
        data: the file's bytes, untouched.
        extension: of the file, without the dot.
        height: pixels as coded.
        width: pixels.
        frame_indices: frames that were planned, from 0 in the order of display, two for each temporal patch.
    """

    data: bytes
    extension: str
    height: int
    width: int
    frame_indices: tuple[int, ...]


@dataclass(frozen=True)
class BadMedia:
    """A picture or video that does not decode to what was announced, and why."""

    reason: str


@dataclass(frozen=True)
class Media:
    """One picture or video as a row's JSON lists it.

    Attributes:
        name: of its member in the shard.
        size_bytes: of its bytes, like crc32.
        height: pixels of the decoded picture, turned, or of a frame as coded.
        width: pixels.
        kind: a picture takes one entry of the document's frames, a video one for each two of frame_indices.
        orientation: of a picture, as in `Picture`.
        frame_indices: of a video, as in `Clip`.
    """

    name: str
    size_bytes: int
    crc32: int
    height: int
    width: int
    kind: Literal["image", "video"] = "image"
    orientation: int = 1
    frame_indices: tuple[int, ...] = ()

    @property
    def num_frames(self) -> int:
        """Entries of the document's frames that it takes."""
        return len(self.frame_indices) // 2 if self.kind == "video" else 1


def describe(item: Picture | Clip) -> dict[str, Any]:
    """The fields of a row's JSON that say how to decode an item."""
    if isinstance(item, Clip):
        return {"kind": "video", "frame_indices": item.frame_indices}
    return {"kind": "image"} | ({"orientation": item.orientation} if item.orientation != 1 else {})


def parse_media(listed: dict[str, Any]) -> Media:
    """Read an entry of a row's JSON.

    Raises:
        ValueError: fields that contradict each other.
        TypeError: a field that is missing or unknown.
    """
    media = Media(**listed | {"frame_indices": tuple(listed.get("frame_indices", ()))})
    indices = media.frame_indices
    if media.kind not in ("image", "video") or (media.kind == "video") != bool(indices) or len(indices) % 2:
        raise ValueError(f"{media.name} is a {media.kind} of {len(indices)} frames")
    if not 1 <= media.orientation <= 8:
        raise ValueError(f"{media.name} has orientation {media.orientation}")
    return media
