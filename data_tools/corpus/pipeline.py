"""How a tool goes over a corpus: read, check, apply, write; before it a scan and a plan where a decision needs all samples.

Keys are unique in what is written. Within a chunk this is seen at once; across chunks when every chunk is done: a chunk with a
sample whose key an earlier chunk has is written again without it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from data_tools.corpus.checks import Check, Loaded, load_record
from data_tools.corpus.faults import Dropped, Fault
from data_tools.corpus.job import DROPPED, REPAIRED, Job, Tally, chunk_path, write_json
from data_tools.corpus.media import Record
from data_tools.corpus.writer import Form, open_writer

SCAN, PLAN, WRITE = "scan", "plan", "write"
DUPLICATE = "key_duplicate"


class Source(Protocol):
    """A chunk that gives samples."""

    @property
    def number(self) -> int:
        """Counts from 0 over all parts."""

    def read(self) -> Iterator[Record | Dropped]:
        """Its samples in order."""


@dataclass(frozen=True)
class Context:
    """Where a tool is while it works on a chunk.

    Attributes:
        number: of the chunk.
        folder: of the pass; files that start with the chunk's number are the tool's.
        plan: what the plan of a tool with a scan left.
        scratch: what outlives a chunk that is begun again, such as answers that were paid for.
    """

    number: int
    folder: Path
    plan: Path
    scratch: Path


class Tool(Protocol):
    """Decides about samples; picklable. It gives what it was given, in order, changed or as Dropped."""

    @property
    def name(self) -> str:
        """Of the command."""

    def settings(self) -> dict[str, Any]:
        """Everything that its output depends on, as JSON."""

    def apply(self, samples: Iterator[Loaded], context: Context) -> Iterator[Loaded | tuple[Loaded, Dropped]]:
        """The samples to write, and those that it drops with why."""


@runtime_checkable
class ScanningTool(Tool, Protocol):
    """A tool that looks at all samples before it decides."""

    @property
    def scan_check(self) -> Check | None:
        """How the scan looks at media; None when it reads texts only."""

    def scan(self, samples: Iterator[Loaded], context: Context) -> None:
        """Save what the plan needs of a chunk."""

    def plan(self, numbers: Sequence[int], scans: Path, folder: Path, excluded: dict[int, list[int]]) -> dict[str, Any]:
        """Decide from all scans and save it in `folder`; returns entries of the report."""


@runtime_checkable
class FinishingTool(Tool, Protocol):
    """A tool that adds files of its own once every chunk is written."""

    def finish(self, numbers: Sequence[int], passes: Path, folder: Path) -> dict[str, Any]:
        """Write them into `folder`, from what the tool left in the folders of the passes; returns entries of the report."""


@dataclass(frozen=True)
class Settings:
    """What every tool over a corpus is told.

    Attributes:
        form: of the output.
        check: how media are looked at.
        shard_bytes: size that closes a tar or Parquet file.
    """

    form: Form = "jsonl"
    check: Check = "decode"
    shard_bytes: int = 1 << 30


@dataclass
class _Seen:
    """What a chunk's samples left: those dropped, with their places, and the keys of all."""

    dropped: list[tuple[int, Dropped]] = field(default_factory=list)
    keys: dict[int, int] = field(default_factory=dict)
    repaired: list[Dropped] = field(default_factory=list)
    samples: int = 0


@dataclass(frozen=True)
class ChunkWork:
    """One chunk of a scan or of writing; see `run_tool`."""

    tool: Tool
    settings: Settings
    partial: Path
    is_scan: bool
    excluded: dict[int, list[int]] = field(default_factory=dict)

    def __call__(self, chunk: Source, folder: Path) -> Tally:
        """Do a chunk."""
        context = Context(chunk.number, folder, self.partial / PLAN, self.partial / "scratch")
        seen, kept = _Seen(), 0
        samples = self._load(chunk, seen, self._scanned_faults(chunk.number))
        if self.is_scan:
            assert isinstance(self.tool, ScanningTool)
            self.tool.scan(samples, context)
        else:
            writer = open_writer(self.settings.form, self.partial, chunk.number, self.settings.shard_bytes)
            for result in self.tool.apply(samples, context):
                if isinstance(result, Loaded):
                    writer.write(result)
                    kept += 1
                    seen.repaired += _misnamed(result)
                else:
                    seen.dropped.append((result[0].position, result[1]))
            writer.close()
        return self._save(chunk.number, folder, seen, kept)

    def _load(self, chunk: Source, seen: _Seen, known: dict[int, Dropped]) -> Iterator[Loaded]:
        """The usable samples of a chunk, media in memory; everything else goes to `seen`."""
        excluded = set(self.excluded.get(chunk.number, ()))
        taken: set[int] = set()
        for position, record in enumerate(chunk.read()):
            seen.samples += 1
            if isinstance(record, Dropped):
                seen.dropped.append((position, record))
                continue
            key, digest = record.sample.key, hash_key(record.sample.key)
            if position in excluded:
                taken.add(digest)
            if digest in taken:
                seen.dropped.append((position, Dropped(record.source, key, DUPLICATE, "an earlier sample has this key")))
                continue
            taken.add(digest)
            seen.keys[digest] = position
            if position in known:
                seen.dropped.append((position, known[position]))
                continue
            try:
                loaded = self._open(record, position)
            except Fault as fault:
                seen.dropped.append((position, fault.dropped(record.source, key)))
                continue
            yield loaded

    def _open(self, record: Record, position: int) -> Loaded:
        check: Check | None = self.settings.check
        if isinstance(self.tool, ScanningTool):
            if self.is_scan:
                check = self.tool.scan_check
            elif self.tool.scan_check is not None:
                check = "none"
        return Loaded(record, (), position) if check is None else load_record(record, position, check)

    def _scanned_faults(self, number: int) -> dict[int, Dropped]:
        """Faults that the scan found in media, so that writing need not decode again."""
        path = chunk_path(self.partial / SCAN, number, "faults.json")
        if self.is_scan or not path.exists():
            return {}
        return {position: Dropped(**entry) for position, entry in json.loads(path.read_text(encoding="utf-8"))}

    def _save(self, number: int, folder: Path, seen: _Seen, kept: int) -> Tally:
        seen.dropped.sort(key=lambda entry: entry[0])
        dropped = [entry for _, entry in seen.dropped]
        _write_lines(chunk_path(folder, number, DROPPED), dropped)
        _write_lines(chunk_path(folder, number, REPAIRED), seen.repaired)
        pairs = np.array(list(seen.keys.items()), dtype=np.int64).reshape(-1, 2)
        np.save(chunk_path(folder, number, "keys.npy"), pairs)
        if self.is_scan:
            faults = [[position, vars(entry)] for position, entry in seen.dropped if entry.reason != DUPLICATE]
            chunk_path(folder, number, "faults.json").write_text(json.dumps(faults), encoding="utf-8")
        reasons = Counter(entry.reason for entry in dropped)
        counts = {"misnamed": len(seen.repaired)} if seen.repaired else {}
        return Tally(seen.samples, kept, dict(reasons), sum(entry.is_fault for entry in dropped), counts)


def run_tool(tool: Tool, job: Job, chunks: Sequence[Source], settings: Settings) -> dict[str, Any]:
    """Run a tool over a corpus.

    Args:
        tool: what is done to each sample.
        job: where and by whom.
        chunks: of the whole corpus; the job's part of them is done.
        settings: of reading and writing.

    Returns:
        The report; when other parts are not done, what to do next.

    Raises:
        CorpusError: the folder cannot be used, another process does this part, or the job stopped at too many faults.
    """
    with job.claimed():
        return _run(tool, job, chunks, settings)


def _run(tool: Tool, job: Job, chunks: Sequence[Source], settings: Settings) -> dict[str, Any]:
    report = job.start()
    if report is not None:
        return report
    (job.partial / "scratch").mkdir(exist_ok=True)
    excluded: dict[int, list[int]] = {}
    extra: dict[str, Any] = {}
    scans = isinstance(tool, ScanningTool)
    if isinstance(tool, ScanningTool):
        if not job.run_pass(SCAN, chunks, ChunkWork(tool, settings, job.partial, is_scan=True)):
            return job.waiting_report(SCAN)
        with job.alone():
            excluded, extra = _plan(tool, job, [chunk.number for chunk in chunks])
    if not job.run_pass(WRITE, chunks, ChunkWork(tool, settings, job.partial, is_scan=False, excluded=excluded)):
        return job.waiting_report(WRITE)
    with job.alone():
        finished = job.finished()
        if finished is not None:
            return finished
        if not scans:
            _write_without_duplicates(tool, job, chunks, settings)
        if isinstance(tool, FinishingTool):
            extra = extra | tool.finish([chunk.number for chunk in chunks], job.partial, job.partial)
        return job.finish([SCAN, WRITE] if scans else [WRITE], chunks, extra)


def hash_key(key: str) -> int:
    """64 bits of a key, signed."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)


def find_duplicates(keys: Sequence[tuple[int, npt.NDArray[np.int64]]]) -> dict[int, list[int]]:
    """Samples whose key an earlier chunk has.

    Args:
        keys: chunk number and [n, 2] hashes and positions, by chunk.

    Returns:
        chunk number -> positions, for chunks with such samples.
    """
    hashes = np.concatenate([np.empty(0, np.int64), *(pairs[:, 0] for _, pairs in keys)])
    order = np.argsort(hashes, kind="stable")
    later = np.zeros(len(hashes), dtype=bool)
    later[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
    found: dict[int, list[int]] = {}
    start = 0
    for number, pairs in keys:
        own = later[start : start + len(pairs)]
        if own.any():
            found[number] = pairs[own, 1].tolist()
        start += len(pairs)
    return found


def _load_keys(folder: Path, numbers: Sequence[int]) -> list[tuple[int, npt.NDArray[np.int64]]]:
    return [(number, np.load(chunk_path(folder, number, "keys.npy"))) for number in numbers]


def _plan(tool: ScanningTool, job: Job, numbers: Sequence[int]) -> tuple[dict[int, list[int]], dict[str, Any]]:
    folder, scans = job.partial / PLAN, job.partial / SCAN
    path = folder / "plan.json"
    folder.mkdir(exist_ok=True)
    if not path.exists():
        excluded = find_duplicates(_load_keys(scans, numbers))
        report = tool.plan(numbers, scans, folder, excluded)
        write_json(path, {"excluded": list(excluded.items()), "report": report})
    tree = json.loads(path.read_text(encoding="utf-8"))
    return dict(tree["excluded"]), tree["report"]


def _write_without_duplicates(tool: Tool, job: Job, chunks: Sequence[Source], settings: Settings) -> None:
    """Once every chunk is written: again, those that hold keys of earlier chunks. Rewritten chunks no longer hold them."""
    excluded = find_duplicates(_load_keys(job.partial / WRITE, [chunk.number for chunk in chunks]))
    work = ChunkWork(tool, settings, job.partial, is_scan=False, excluded=excluded)
    job.redo(WRITE, [chunk for chunk in chunks if chunk.number in excluded], work)


def _misnamed(loaded: Loaded) -> list[Dropped]:
    record = loaded.record
    return [
        Dropped(record.source, record.sample.key, "wrong_extension", f"{ref.name} is {medium.extension}", is_fault=False)
        for ref, medium in zip(record.media, loaded.media, strict=False) if medium.was_misnamed
    ]  # fmt: skip


def _write_lines(path: Path, entries: Sequence[Dropped]) -> None:
    path.write_text("".join(entry.line() + "\n" for entry in entries), encoding="utf-8")
