"""JSONL files with media beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.corpus.faults import Dropped, Fault
from data_tools.corpus.media import Place, Record
from data_tools.corpus.record import build_record, parse_json

BLOCK = 1 << 20
MAX_LINE = 256 << 20
"""Bytes of the longest line that is read; pictures inside it as data: URIs count."""


def list_runs(path: Path, size: int) -> Iterator[tuple[int, int, int]]:
    """Cut a file into runs of `size` lines without holding any of it.

    Yields:
        number of lines before the run, its lines, the byte it starts at.

    Raises:
        OSError: the file cannot be read.
    """
    first = start = lines = position = 0
    ended = True
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found = -1
            while (found := block.find(b"\n", found + 1)) >= 0:
                lines += 1
                if lines - first == size:
                    yield first, size, start
                    first, start = lines, position + found + 1
            position += len(block)
            ended = block.endswith(b"\n")
    lines += not ended
    if lines > first:
        yield first, lines - first, start


def read_run(path: Path, first: int, count: int, start: int, roots: Sequence[Path], label: str) -> Iterator[Record | Dropped]:
    """The samples of a run of lines; blank lines are passed over."""
    for source, offset, line in read_lines(path, first, count, start, label):
        if isinstance(line, Dropped):
            yield line
        else:
            yield _read_line(line, source, Place("line", str(path), offset, len(line)), roots)


def read_lines(path: Path, first: int, count: int, start: int, label: str) -> Iterator[tuple[str, int, bytes | Dropped]]:
    """The lines of a run: what each is called, its first byte, its bytes; blank lines are passed over."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            for number in range(first + 1, first + count + 1):
                offset = file.tell()
                line = file.readline(MAX_LINE + 1)
                source = f"{label}:{number}"
                if len(line) > MAX_LINE:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(BLOCK)
                    yield source, offset, Dropped(source, source, "line_too_long", f"more than {MAX_LINE} bytes")
                elif line.strip():
                    yield source, offset, line
    except OSError as error:
        yield label, start, Dropped(label, label, "file_unreadable", str(error))


def _read_line(line: bytes, source: str, holder: Place, roots: Sequence[Path]) -> Record | Dropped:
    try:
        return build_record(parse_json(line), source, holder, roots)
    except Fault as fault:
        return fault.dropped(source)
