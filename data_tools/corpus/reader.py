"""One way to read every corpus: a list of chunks, the samples of a chunk, the bytes of a medium.

A chunk is a run of lines, a tar or a run of row groups. The chunks of a corpus depend on its files and the chunk size alone, so
processes and machines can divide them without talking to each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_tools.corpus import jsonl, parquet, webdataset
from data_tools.corpus.faults import Dropped, Fault
from data_tools.corpus.media import MediaRef, Place, Record, read_bytes
from data_tools.corpus.record import build_record, parse_json
from megatron_glmv.config.base import InputError

CHUNK = 1024
"""Samples of a chunk; a tar is one chunk whatever it holds."""
FORMS: dict[str, Literal["jsonl", "tar", "parquet"]] = {".jsonl": "jsonl", ".tar": "tar", ".parquet": "parquet"}


LISTS = ("dropped.jsonl", "repaired.jsonl")
"""What tools write beside the samples; not read from a folder."""


class CorpusError(InputError):
    """A corpus or output folder that cannot be used; the message names it."""


@dataclass(frozen=True)
class Chunk:
    """A part of a corpus.

    Attributes:
        number: counts over all files of the corpus.
        path: the file.
        label: what samples without a key and messages call the file; no two files of a corpus share one.
        form: of the file.
        first: samples of the file before this chunk.
        count: samples (lines, rows) in it; 0 for a tar, which is counted when it is read.
        start: byte of the first line, or the first row group.
        roots: folders under which samples may name files.
    """

    number: int
    path: Path
    label: str
    form: Literal["jsonl", "tar", "parquet"]
    first: int
    count: int
    start: int
    roots: tuple[Path, ...]

    def read(self) -> Iterator[Record | Dropped]:
        """Its samples in order; what cannot be used comes as Dropped, and nothing is raised."""
        if self.form == "tar":
            return webdataset.read_tar(self.path, self.label)
        read_run = jsonl.read_run if self.form == "jsonl" else parquet.read_run
        return read_run(self.path, self.first, self.count, self.start, self.roots, self.label)


def list_files(inputs: Sequence[Path]) -> dict[str, Path]:
    """The corpus files that inputs name, in order; a folder stands for every .jsonl, .tar and .parquet below it, sorted.

    Returns:
        label -> file; a label is the path below the input folder, or the file's name, numbered where that is taken.

    Raises:
        CorpusError: an input is missing, of another kind, or a folder without such files.
    """
    files: dict[str, Path] = {}
    for number, path in enumerate(inputs):
        found = [path]
        if path.is_dir():
            found = sorted(
                file for file in path.rglob("*") if file.suffix in FORMS and file.name not in LISTS and file.is_file()
            )
            if not found:
                raise CorpusError(f"{path}: no .jsonl, .tar or .parquet file below this folder")
        elif not path.is_file():
            raise CorpusError(f"{path}: no such file or folder")
        elif path.suffix not in FORMS:
            raise CorpusError(
                f"{path}: not a .jsonl, .tar or .parquet file (compressed tars have no random access: unpack them)"
            )
        for file in found:
            label = file.relative_to(path).as_posix() if path.is_dir() else file.name
            files[label if label not in files else f"{number}/{label}"] = file
    return files


def list_chunks(inputs: Sequence[Path], size: int = CHUNK, media_roots: Sequence[Path] = ()) -> list[Chunk]:
    """Cut a corpus into chunks.

    Args:
        inputs: files and folders.
        size: samples of a chunk.
        media_roots: further folders under which samples may name files, besides that of each file.

    Raises:
        CorpusError: as list_files.
        OSError: a file cannot be read.
    """
    chunks: list[Chunk] = []
    for label, path in list_files(inputs).items():
        form = FORMS[path.suffix]
        roots = (path.parent.resolve(), *(root.resolve() for root in media_roots))
        runs: Iterator[tuple[int, int, int]] = iter([(0, 0, 0)])
        if form != "tar":
            runs = (jsonl if form == "jsonl" else parquet).list_runs(path, size)
        chunks += [Chunk(len(chunks) + place, path, label, form, *run, roots) for place, run in enumerate(runs)]
    return chunks


def read_media(ref: MediaRef, roots: Sequence[Path] = ()) -> bytes:
    """The bytes of a medium, wherever they are; `ref` may have been saved and loaded since the sample was read.

    Args:
        ref: of a sample.
        roots: of the chunk it came from; needed only for media inside a line or row beside others that are files.

    Raises:
        Fault: the bytes are gone, empty or too large.
    """
    if ref.data is not None or ref.place.holder in ("file", "range"):
        return read_bytes(ref)
    record = build_record(_read_again(ref.place), ref.name, ref.place, roots or (Path(ref.place.path).parent.resolve(),))
    return read_bytes(record.media[ref.place.ordinal])


def _read_again(place: Place) -> dict[str, object]:
    if place.holder == "row":
        return parquet.read_row(place.path, place.offset)
    if place.holder == "member":
        return webdataset.read_member(place)
    try:
        with Path(place.path).open("rb") as file:
            file.seek(place.offset)
            return parse_json(file.read(place.size_bytes))
    except OSError as error:
        raise Fault("file_unreadable", f"{place.path} ({error})") from None
