"""WebDataset tars: members that share a name up to its first dot are one sample.

Nothing is ever unpacked: a member is a range of the tar. The tar is walked header by header, so a damaged one gives every
sample before the damage.

Source: webdataset 1.0, the naming convention of its tars; img2dataset's jpg, txt and json are read as picture and caption.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from data_tools.corpus.faults import Dropped, Fault
from data_tools.corpus.media import Kind, MediaRef, Place, Record, read_bytes
from data_tools.corpus.record import build_record, parse_json

EXTENSIONS: dict[str, Kind] = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "avif", "jp2", "img"), get_args(Kind)[0]),
    **dict.fromkeys(("mp4", "mkv", "webm", "mov", "avi"), get_args(Kind)[1]),
}
TEXTS = ("txt", "caption", "text")


@dataclass
class _Group:
    """The members of one sample, and the first thing wrong with them."""

    key: str
    members: list[tuple[str, str, int, int]] = field(default_factory=list)  # extension, name, offset, size
    fault: Fault | None = None


def read_tar(path: Path, label: str) -> Iterator[Record | Dropped]:
    """The samples of a tar, in its order, and at its end the fault that ended it early."""
    group: _Group | None = None
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:", errorlevel=0) as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
                if info.isdir():
                    continue
                key, extension = _split_name(info.name)
                if group is not None and key != group.key:
                    yield _read_group(path, group, label)
                    group = None
                group = group or _Group(key)
                if info.offset_data + info.size > size:
                    raise tarfile.ReadError(f"ends within {info.name!r}")
                _add_member(group, info, extension)
            damage = _find_damage(path, tar.offset)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        damage = str(error)
        # A truncated tar's last sample may be short of members that were cut off; it is part of the damage.
        group = None
    if group is not None:
        yield _read_group(path, group, label)
    if damage:
        yield Dropped(label, label, "tar_broken", damage)


def read_member(place: Place) -> dict[str, Any]:
    """The JSON of a sample again.

    Raises:
        Fault: the tar changed.
    """
    holder = Place("range", place.path, place.offset, place.size_bytes)
    return parse_json(read_bytes(MediaRef("image", Path(place.path).name, holder)))


def _find_damage(path: Path, offset: int) -> str:
    """Why a walk ended where no zeros end the tar; tarfile itself takes any bad header for the end."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(512)
    if not block:
        return "ends without the blocks that end a tar"
    return "" if not any(block) else f"the header at byte {offset} is damaged"


def _split_name(name: str) -> tuple[str, str]:
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _add_member(group: _Group, info: tarfile.TarInfo, extension: str) -> None:
    if group.fault is not None:
        return
    if info.name.startswith("/") or ".." in info.name.split("/"):
        group.fault = Fault("name_outside", info.name)
    elif not info.isreg() or info.issparse():
        group.fault = Fault("member_not_a_file", info.name)
    elif any(extension == other for other, *_ in group.members):
        group.fault = Fault("member_duplicate", info.name)
    else:
        group.members.append((extension, info.name, info.offset_data, info.size))


def _read_group(path: Path, group: _Group, label: str) -> Record | Dropped:
    source = f"{label}:{group.key}".encode("utf-8", "backslashreplace").decode()
    key = group.key.encode("utf-8", "backslashreplace").decode()
    try:
        if group.fault is not None:
            raise group.fault
        return _build(path, group, source, key)
    except Fault as fault:
        return fault.dropped(source, key)


def _build(path: Path, group: _Group, source: str, key: str) -> Record:
    tree: dict[str, Any] = {}
    attached: list[MediaRef] = []
    text: str | None = None
    holder = Place("member", str(path))
    for extension, name, offset, size in group.members:
        last = extension.rpartition(".")[2]
        place = Place("range", str(path), offset, size)
        if extension == "json":
            holder = Place("member", str(path), offset, size)
            tree = parse_json(read_bytes(MediaRef("image", name, place)))
        elif extension in TEXTS:
            text = _decode(read_bytes(MediaRef("image", name, place)) if size else b"")
        elif last in EXTENSIONS:
            attached.append(MediaRef(EXTENSIONS[last], name, place))
    if text is not None and not {"messages", "conversations"} & set(tree):
        tree = {name: value for name, value in tree.items() if name not in ("text", "txt", "image", "images")} | {
            "caption": text
        }
    return build_record(tree, source, holder, (), attached, key)


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Fault("text_not_unicode", str(error)) from None
