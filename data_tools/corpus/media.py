"""Where the bytes of a picture or video are, and how to get them without leaving the corpus.

A reference is small and can be saved, so that a tool may look at media long after it read the sample: a file, a range of a tar,
or a place inside a line or row that is read again.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_tools.corpus.faults import Fault
from megatron_glmv.data.sample import Sample

MAX_IMAGE_BYTES = 256 << 20
MAX_VIDEO_BYTES = 8 << 30
"""Larger files are not read; a picture of the largest size that is decoded has less as an uncompressed TIFF or PNG."""

Kind = Literal["image", "video"]
Holder = Literal["file", "range", "line", "member", "row"]


@dataclass(frozen=True)
class Place:
    """Where bytes are.

    Attributes:
        holder: "file" a whole file; "range" bytes of a file; "line", "member" and "row": inside a sample of a JSONL file, of a
            tar's JSON member, of a Parquet file, which is read again.
        path: the file.
        offset: first byte, or the row's number.
        size_bytes: of the range or line; unused for a file or row.
        ordinal: which of the sample's media it is.
    """

    holder: Holder
    path: str
    offset: int = 0
    size_bytes: int = 0
    ordinal: int = 0


@dataclass(frozen=True)
class MediaRef:
    """A picture or video of a sample.

    Attributes:
        kind: what the sample says that it is.
        name: as the sample or tar calls it, for its extension and for messages; never used to write.
        place: where its bytes are.
        data: the bytes where they came with the sample; not kept when the reference is saved.
    """

    kind: Kind
    name: str
    place: Place
    data: bytes | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Record:
    """A sample of a corpus with its media.

    Attributes:
        sample: the conversation; the value of a medium is its name.
        media: in the order of the text, one for each image and video item.
        source: the file it stands in, with line, row or member.
        extra: every other field, as read.
    """

    sample: Sample
    media: tuple[MediaRef, ...]
    source: str
    extra: dict[str, Any] = field(default_factory=dict)


def read_bytes(ref: MediaRef) -> bytes:
    """The bytes of a medium that is a file, a range, or came with its sample; `reader.read_media` reads every kind.

    Raises:
        Fault: the file is gone, empty, too large or shorter than the range.
    """
    limit = MAX_VIDEO_BYTES if ref.kind == "video" else MAX_IMAGE_BYTES
    data = ref.data
    if data is None:
        data = _read_place(ref.place, limit)
    if not data:
        raise Fault("media_empty", ref.name)
    if len(data) > limit:
        raise Fault("media_too_large", f"{ref.name}: {len(data)} bytes")
    return data


def _read_place(place: Place, limit: int) -> bytes:
    try:
        with Path(place.path).open("rb") as file:
            size = place.size_bytes if place.holder == "range" else os.fstat(file.fileno()).st_size
            if size > limit:
                raise Fault("media_too_large", f"{place.path}: {size} bytes")
            file.seek(place.offset)
            data = file.read(size)
    except FileNotFoundError:
        raise Fault("media_missing", place.path) from None
    except (OSError, ValueError) as error:
        raise Fault("file_unreadable", f"{place.path} ({error})") from None
    if len(data) < size:
        raise Fault("tar_broken", f"{place.path}: ends within a member")
    return data


def locate_file(name: str, roots: Sequence[Path]) -> Path:
    """The file that a sample names, which must lie under one of the corpus's folders.

    Args:
        name: relative to one of the roots, or absolute.
        roots: absolute folders without links; the first that holds the file counts.

    Raises:
        Fault: a URL, a name that leads outside every root (also over a link), or no such file.
    """
    if "://" in name:
        raise Fault("media_remote", name)
    outside = 0
    try:
        for root in roots:
            path = (root / name).resolve()
            if not path.is_relative_to(root):
                outside += 1
            elif path.is_file():
                return path
    except (OSError, ValueError, RuntimeError) as error:
        raise Fault("media_missing", f"{name} ({error})") from None
    raise Fault("name_outside" if outside == len(roots) else "media_missing", name)


def decode_data_uri(text: str) -> bytes:
    """The bytes of a data: URI.

    Raises:
        Fault: not base64.
    """
    head, comma, body = text.partition(",")
    if not comma or not head.endswith(";base64"):
        raise Fault("media_data_uri", text[:60])
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Fault("media_data_uri", f"{head} ({error})") from None
