"""Sizes and checksums of a checkpoint's files: written down when it is published, compared before it is trusted.

CRC-32 finds what disks and networks do to files (a lost tail, a flipped bit, a block of zeros), not what somebody means to do.
Every rank sums the files it wrote, while they are still in the page cache, so that a save of hundreds of gigabytes is summed by
hundreds of ranks at once.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

FILES = "files"
"""Of a manifest: file name -> [bytes, CRC-32]."""
OWN_SUM = "checksum"
"""Of a manifest: CRC-32 of the rest of it."""
_BLOCK_BYTES = 16 * 2**20

Sums = dict[str, tuple[int, int]]
"""File name -> (bytes, CRC-32)."""


def sum_file(path: Path, moved: Callable[[], object] = lambda: None) -> tuple[int, int]:
    """Bytes and CRC-32 of a file; `moved` is called after every block of it."""
    size = total = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            total = zlib.crc32(block, total)
            size += len(block)
            moved()
    return size, total


def sum_files(folder: Path, names: Iterable[str]) -> Sums:
    """Bytes and CRC-32 of some files of a folder."""
    return {name: sum_file(folder / name) for name in names}


def manifest_sum(manifest: Mapping[str, Any]) -> int:
    """CRC-32 of a manifest without its own."""
    rest = {key: value for key, value in manifest.items() if key != OWN_SUM}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def find_damage(
    folder: Path,
    manifest: Mapping[str, Any],
    *,
    part: int = 0,
    parts: int = 1,
    whole: bool = True,
    moved: Callable[[], object] = lambda: None,
) -> str:
    """What is wrong with a checkpoint's files; empty: nothing.

    Args:
        folder: the checkpoint.
        manifest: of it; one without sums, as earlier versions wrote, finds nothing.
        part: this rank's share of the files.
        parts: shares; all of them together look at every file.
        whole: read the files and compare checksums; otherwise sizes alone.
        moved: called after every block that was read.

    Raises:
        OSError: a file that is there cannot be read, which says nothing about what it holds.
    """
    names = sorted(manifest.get(FILES, {}))
    for name in names[part::parts]:
        size, expected = manifest[FILES][name]
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes of {size:,}"
            if whole and sum_file(folder / name, moved)[1] != expected:
                return f"{name} is not what was written: its checksum differs"
        except FileNotFoundError:
            return f"{name} is missing"
    return ""
