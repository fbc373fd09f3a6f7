"""Parquet files in the layout of Hugging Face's data sets: media as {bytes, path} structs, conversations as lists of structs.

Source: datasets 4, features Image and Video: a struct of bytes and path, of which either may be null.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.corpus.faults import Dropped, Fault
from data_tools.corpus.media import Place, Record
from data_tools.corpus.record import build_record, parse_json

BATCH = 16
"""Rows that are in memory at once."""
BROKEN = (pa.ArrowException, OSError, ValueError)


def list_runs(path: Path, size: int) -> Iterator[tuple[int, int, int]]:
    """Cut a file into runs of row groups with about `size` rows.

    Yields:
        number of rows before the run, its rows, its first row group; one run of no rows for a file that cannot be read.
    """
    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
    except BROKEN:
        yield 0, 0, 0
        return
    first = rows = start = 0
    for number, count in enumerate(groups):
        rows += count
        if rows >= size or number + 1 == len(groups):
            yield first, rows, start
            first, rows, start = first + rows, 0, number + 1


def read_run(path: Path, first: int, count: int, start: int, roots: Sequence[Path], label: str) -> Iterator[Record | Dropped]:
    """The samples of a run of row groups."""
    row = first
    try:
        with pq.ParquetFile(path) as file:
            groups: list[int] = []
            end = first
            while end < first + count:
                groups.append(start + len(groups))
                end += file.metadata.row_group(groups[-1]).num_rows
            for batch in file.iter_batches(BATCH, row_groups=groups):
                for tree in batch.to_pylist():
                    yield _read_row(path, row, tree, roots, f"{label}:{row + 1}")
                    row += 1
    except BROKEN as error:
        detail = f"{str(error).splitlines()[0] if str(error) else error!r}; {first + count - row} rows are lost"
        yield Dropped(f"{label}:{row + 1}", f"{label}:{row + 1}", "parquet_broken", detail)


def read_row(path: str, row: int) -> dict[str, Any]:
    """One row again; rows of one row group after each other are cheap, others are not.

    Raises:
        Fault: the file changed or is damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.metadata.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if row < count:
                    break
                row -= count
        return _tree(_read_group(path, group).slice(row, 1).to_pylist()[0])
    except BROKEN as error:
        raise Fault("parquet_broken", f"{path} ({error})") from None


@lru_cache(maxsize=1)
def _read_group(path: str, group: int) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read_row_group(group)


def _tree(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what was written as JSON text read: conversations that have no common structure, and other fields."""
    for name in ("messages", "conversations"):
        if isinstance(row.get(name), str):
            row[name] = parse_json(b'{"x":' + row[name].encode("utf-8", "backslashreplace") + b"}")["x"]
    if isinstance(row.get("extra"), str):
        row |= parse_json(row.pop("extra").encode())
    return row


def _read_row(path: Path, row: int, tree: dict[str, Any], roots: Sequence[Path], source: str) -> Record | Dropped:
    try:
        return build_record(_tree(tree), source, Place("row", str(path), row), roots)
    except Fault as fault:
        return fault.dropped(source)
