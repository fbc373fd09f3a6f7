"""`glmv-data dedupe`: of samples that are the same or nearly so one stays, and what a benchmark contains goes.

A scan hashes every sample, a plan joins the hashes of all parts, and a second pass writes what stays. Which samples count as
nearly the same depends on what they are made of: pictures by their pictures, texts by their words, videos only by both, because
many clips share a setting or a caption.

Source: GLM-4.1V-Thinking (arXiv 2507.01006v6) section 3.1: image de-duplication; video only when video and text are both close;
contamination checks. Runs of 13 words as evidence of contamination: Brown et al. (arXiv 2005.14165) appendix C.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_tools.corpus import arguments
from data_tools.corpus.checks import Check, Loaded, load_record
from data_tools.corpus.faults import Dropped, Fault
from data_tools.corpus.job import chunk_path
from data_tools.corpus.media import Record
from data_tools.corpus.pipeline import Context
from data_tools.corpus.reader import CorpusError, list_chunks, list_files
from data_tools.similarity import (
    I64,
    U64,
    find_equal,
    hash_grams,
    hash_picture,
    hash_text,
    label_clusters,
    label_hashes,
    near_texts,
    normalise_text,
    split_words,
)

REASONS = {
    "duplicate_exact": "the same bytes of media and the same words as a sample that stays",
    "duplicate_near": "nearly the same as a sample that stays",
    "benchmark_image": "a picture or video of a benchmark",
    "benchmark_text": "a run of --ngram words of a benchmark",
}
TEXT_ONLY, PICTURES, VIDEOS = range(3)
Match = Literal["image", "text", "both"]


@dataclass(frozen=True)
class Benchmark:
    """What must not be trained on: hashes of pictures, [n, frames] of videos, and of runs of words (sorted)."""

    pictures: U64
    videos: U64
    grams: U64


@dataclass(frozen=True)
class Dedupe:
    """The tool.

    Attributes:
        distance: bits in which hashes of near pictures differ at most.
        resemblance: share of common character runs of near texts at least.
        match: what makes samples with pictures near: their pictures, their texts, or both.
        keep: which of a cluster stays: the first, or the one with the most pixels.
        exact_only: do not look for near ones.
        benchmarks: corpora of benchmarks.
        ngram: words of a run.
    """

    distance: int = 6
    resemblance: float = 0.8
    match: Match = "image"
    keep: Literal["first", "largest"] = "first"
    exact_only: bool = False
    benchmarks: tuple[Path, ...] = ()
    ngram: int = 13
    name: str = "dedupe"

    def settings(self) -> dict[str, Any]:
        """Limits, and the benchmarks' files by name and size."""
        files = {label: path.stat().st_size for label, path in list_files(self.benchmarks).items()}
        return {"distance": self.distance, "resemblance": self.resemblance, "match": self.match, "keep": self.keep,
                "exact_only": self.exact_only, "benchmarks": files, "ngram": self.ngram}  # fmt: skip

    @property
    def scan_check(self) -> Check:
        """Hashing needs pixels."""
        return "decode"

    def scan(self, samples: Iterator[Loaded], context: Context) -> None:
        """Save the hashes of a chunk."""
        features = _Features()
        benchmark = load_benchmark(self.benchmarks, self.ngram)
        for loaded in samples:
            text = normalise_text(all_text(loaded.record))
            frames = [[hash_picture(preview) for preview in medium.previews] for medium in loaded.media]
            features.add(loaded, text, frames)
            found = self._find_benchmark(loaded, split_words(text), frames, benchmark)
            if found:
                features.contaminated[loaded.position] = found
        features.save(context.folder, context.number)

    def plan(self, numbers: Sequence[int], scans: Path, folder: Path, excluded: dict[int, list[int]]) -> dict[str, Any]:
        """Decide which samples go: one file for each chunk, and clusters.jsonl beside the output."""
        corpus = _Corpus.load(scans, numbers, excluded)
        dropped: dict[int, dict[int, tuple[str, str]]] = defaultdict(dict)
        for number, position, reason, detail in corpus.contaminated:
            dropped[number][position] = (reason, detail)
        clusters = self._find_clusters(corpus)
        exact = corpus.read("exact")
        keys = corpus.read_keys(np.array(sorted(index for stays, others in clusters for index in (stays, *others)), np.int64))
        lines = []
        for stays, others in clusters:
            kept = keys[stays]
            for index in others:
                is_exact = bool((exact[index] == exact[stays]).all())
                reason = "duplicate_exact" if is_exact else "duplicate_near"
                dropped[int(corpus.chunks[index])][int(corpus.positions[index])] = (reason, f"of {kept}")
            lines.append(json.dumps({"kept": kept, "dropped": [keys[index] for index in others]}) + "\n")
        for number in numbers:
            chunk_path(folder, number, "json").write_text(json.dumps(list(dropped[number].items())), encoding="utf-8")
        (folder.parent / "clusters.jsonl").write_text("".join(lines), encoding="utf-8")
        largest = max((len(others) + 1 for _, others in clusters), default=0)
        return {"clusters": len(clusters), "largest_cluster": largest, "contaminated": len(corpus.contaminated)}

    def apply(self, samples: Iterator[Loaded], context: Context) -> Iterator[Loaded | tuple[Loaded, Dropped]]:
        """What the plan lets stay."""
        decided = dict(json.loads(chunk_path(context.plan, context.number, "json").read_text(encoding="utf-8")))
        for loaded in samples:
            if loaded.position in decided:
                record = loaded.record
                reason, detail = decided[loaded.position]
                yield loaded, Dropped(record.source, record.sample.key, reason, detail, is_fault=False)
            else:
                yield loaded

    def _find_benchmark(
        self, loaded: Loaded, words: list[str], frames: list[list[int]], benchmark: Benchmark
    ) -> tuple[str, str] | None:
        for ref, medium, hashes in zip(loaded.record.media, loaded.media, frames, strict=True):
            own = np.array(hashes, dtype=np.uint64)
            known = benchmark.videos if medium.kind == "video" else benchmark.pictures
            if known.shape[1] == len(own) and (np.bitwise_count(known ^ own) <= self.distance).all(axis=1).any():
                return "benchmark_image", ref.name
        grams = hash_grams(words, self.ngram) if len(benchmark.grams) else np.empty(0, np.uint64)
        hits = np.flatnonzero(np.isin(grams, benchmark.grams))
        if len(hits):
            return "benchmark_text", " ".join(words[hits[0] : hits[0] + self.ngram])
        return None

    def _find_clusters(self, corpus: _Corpus) -> list[tuple[int, list[int]]]:
        """For each cluster of more than one sample: the one that stays, and the others, all in corpus order."""
        labels = self._label(corpus)
        order = np.argsort(labels, kind="stable")
        starts = np.concatenate([[0], np.flatnonzero(np.diff(labels[order])) + 1, [len(order)]])
        clusters = []
        for number in np.flatnonzero(np.diff(starts) > 1):
            group = order[starts[number] : starts[number + 1]]
            stays = group[0] if self.keep == "first" else group[int(np.argmax(corpus.pixels[group]))]
            clusters.append((int(stays), [int(index) for index in group if index != stays]))
        return sorted(clusters)

    def _label(self, corpus: _Corpus) -> I64:
        if self.exact_only:
            return np.unique(corpus.read("exact"), axis=0, return_inverse=True)[1].reshape(-1)
        uses_media = (corpus.kinds == VIDEOS) | ((corpus.kinds == PICTURES) & (self.match != "text"))
        uses_text = (corpus.kinds != PICTURES) | (self.match != "image")
        # A text that says nothing is near to nothing, unless the pictures decide.
        labels = self._label_media(corpus, uses_media) + 1
        labels = labels * (len(labels) + 1) + self._label_text(corpus, uses_text) + 1
        return np.unique(labels * 3 + corpus.kinds, return_inverse=True)[1].reshape(-1)

    def _label_media(self, corpus: _Corpus, uses: npt.NDArray[np.bool_]) -> I64:
        """Equal for samples with as many pictures or frames, each near its counterpart; -1 where they do not count."""
        labels = np.full(len(uses), -1, dtype=np.int64)
        starts = np.cumsum(corpus.counts) - corpus.counts
        all_hashes = corpus.read_hashes()
        used = 0
        for count in np.unique(corpus.counts[uses & (corpus.counts > 0)]):
            own = np.flatnonzero(uses & (corpus.counts == count))
            hashes, inverse = np.unique(all_hashes[starts[own][:, None] + np.arange(count)], axis=0, return_inverse=True)
            labels[own] = used + label_hashes(hashes, self.distance)[inverse.reshape(-1)]
            used += len(hashes)
        return labels

    def _label_text(self, corpus: _Corpus, uses: npt.NDArray[np.bool_]) -> I64:
        """Equal for samples whose texts are near; -1 where they do not count."""
        labels = np.full(len(uses), -1, dtype=np.int64)
        if uses.any():
            signatures = corpus.read("signatures", uses)
            firsts, which = find_equal(signatures)
            if len(firsts) < len(signatures):
                signatures = signatures[firsts]
            labels[uses] = label_clusters(len(firsts), near_texts(signatures, self.resemblance))[which]
        return labels


@dataclass
class _Features:
    """Hashes of a chunk's samples as they come."""

    rows: list[tuple[int, int, int]] = field(default_factory=list)  # position, kind, pixels
    exact: list[bytes] = field(default_factory=list)
    signatures: list[npt.NDArray[np.uint32]] = field(default_factory=list)
    hashes: list[list[int]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    contaminated: dict[int, tuple[str, str]] = field(default_factory=dict)

    def add(self, loaded: Loaded, text: str, frames: list[list[int]]) -> None:
        """Hash one sample: `text` is all it says, `frames` the perceptual hashes of each of its media, 64 bits each."""
        media = loaded.media
        kind = VIDEOS if any(medium.kind == "video" for medium in media) else PICTURES if media else TEXT_ONLY
        digest = hashlib.sha256(text.encode())
        for medium in media:
            digest.update(hashlib.sha256(medium.data).digest())
        self.rows.append((loaded.position, kind, sum(medium.width * medium.height for medium in media)))
        self.exact.append(digest.digest()[:16])
        self.signatures.append(hash_text(text))
        self.hashes.append([value for hashes in frames for value in hashes])
        self.keys.append(loaded.record.sample.key)

    def save(self, folder: Path, number: int) -> None:
        """Write them for the second pass, as the files of chunk `number`."""
        flat = [value for hashes in self.hashes for value in hashes]
        np.savez(
            chunk_path(folder, number, "npz"),
            rows=np.array(self.rows, dtype=np.int64).reshape(-1, 3),
            exact=np.frombuffer(b"".join(self.exact), dtype=np.uint64).reshape(-1, 2),
            signatures=np.array(self.signatures, dtype=np.uint32).reshape(-1, 64),
            hashes=np.array(flat, dtype=np.uint64),
            counts=np.array([len(hashes) for hashes in self.hashes], dtype=np.int64),
        )
        tree = {"keys": self.keys, "contaminated": list(self.contaminated.items())}
        chunk_path(folder, number, "features.json").write_text(json.dumps(tree), encoding="utf-8")


@dataclass(frozen=True)
class _Corpus:
    """All samples that may stay, in corpus order; hashes and keys stay on disk until they are needed."""

    scans: Path
    stay: dict[int, npt.NDArray[np.bool_]]
    chunks: npt.NDArray[np.int32]
    positions: I64
    kinds: npt.NDArray[np.int8]
    pixels: I64
    counts: I64
    contaminated: list[tuple[int, int, str, str]]

    @classmethod
    def load(cls, scans: Path, numbers: Sequence[int], excluded: dict[int, list[int]]) -> _Corpus:
        """Without samples whose key is taken, and without those of benchmarks."""
        stay: dict[int, npt.NDArray[np.bool_]] = {}
        contaminated: list[tuple[int, int, str, str]] = []
        rows, counts = [np.empty((0, 3), np.int64)], [np.empty(0, np.int64)]
        for number in numbers:
            tree = json.loads(chunk_path(scans, number, "features.json").read_text(encoding="utf-8"))
            found = {position: detail for position, detail in tree["contaminated"] if position not in excluded.get(number, ())}
            contaminated += [(number, position, *detail) for position, detail in found.items()]
            with np.load(chunk_path(scans, number, "npz")) as arrays:
                stay[number] = ~np.isin(arrays["rows"][:, 0], [*excluded.get(number, ()), *found])
                rows.append(arrays["rows"][stay[number]])
                counts.append(arrays["counts"][stay[number]])
        chunks = np.repeat(np.array(list(stay), np.int32), [int(mask.sum()) for mask in stay.values()])
        positions, kinds, pixels = (np.concatenate([part[:, column] for part in rows]) for column in range(3))
        return cls(scans, stay, chunks, positions, kinds.astype(np.int8), pixels, np.concatenate(counts), contaminated)

    def read(self, name: str, wanted: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[Any]:
        """One array of every chunk, of the samples that stay, or of the wanted ones of these."""
        whole = np.empty(0)
        start = filled = 0
        for number, mask in self.stay.items():
            end = start + int(mask.sum())
            with np.load(chunk_path(self.scans, number, "npz")) as arrays:
                own = arrays[name][mask]
            own = own if wanted is None else own[wanted[start:end]]
            if not start:
                size = len(self.chunks) if wanted is None else int(wanted.sum())
                whole = np.empty((size, *own.shape[1:]), own.dtype)
            whole[filled : filled + len(own)] = own
            start, filled = end, filled + len(own)
        return whole

    def read_hashes(self) -> U64:
        """The hashes of every picture and frame, sample by sample."""
        parts = [np.empty(0, np.uint64)]
        for number, mask in self.stay.items():
            with np.load(chunk_path(self.scans, number, "npz")) as arrays:
                parts.append(arrays["hashes"][np.repeat(mask, arrays["counts"])])
        return np.concatenate(parts)

    def read_keys(self, wanted: I64) -> dict[int, str]:
        """The keys of samples by their index; `wanted` ascends."""
        keys: dict[int, str] = {}
        start = 0
        for number, mask in self.stay.items():
            end = start + int(mask.sum())
            own = wanted[slice(*np.searchsorted(wanted, [start, end]))]
            if len(own):
                tree = json.loads(chunk_path(self.scans, number, "features.json").read_text(encoding="utf-8"))
                places = np.flatnonzero(mask)
                keys |= {index: tree["keys"][places[index - start]] for index in own.tolist()}
            start = end
        return keys


def all_text(record: Record) -> str:
    """Every text of a sample, in order."""
    return "\n".join(item.value for message in record.sample.messages for item in message.content if item.kind == "text")


@lru_cache(maxsize=1)
def load_benchmark(benchmarks: tuple[Path, ...], ngram: int) -> Benchmark:
    """Hash benchmark files, once a process; their samples are read like any others.

    Raises:
        CorpusError: a file without a sample that can be read.
    """
    pictures: list[int] = []
    videos: list[list[int]] = []
    grams = [np.empty(0, np.uint64)]
    usable = 0
    for chunk in list_chunks(benchmarks) if benchmarks else ():
        for position, record in enumerate(chunk.read()):
            if isinstance(record, Dropped):
                continue
            grams.append(hash_grams(split_words(normalise_text(all_text(record))), ngram))
            usable += 1
            try:
                media = load_record(record, position, "decode").media
            except Fault:
                continue
            for medium in media:
                hashes = [hash_picture(preview) for preview in medium.previews]
                if medium.kind == "video":
                    videos.append(hashes)
                else:
                    pictures += hashes
    if benchmarks and not usable:
        raise CorpusError(f"{benchmarks[0]}: no benchmark sample can be read; they take the forms of any corpus")
    longest = max(map(len, videos), default=0)
    whole = [hashes for hashes in videos if len(hashes) == longest]
    return Benchmark(np.array(pictures, np.uint64).reshape(-1, 1), np.array(whole, np.uint64).reshape(len(whole), longest),
                     np.unique(np.concatenate(grams)))  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glmv-data dedupe`."""
    codes = "\n".join(f"  {code:18}{meaning}" for code, meaning in REASONS.items())
    parser.description = f"Of samples that are nearly the same one stays; clusters.jsonl lists them.\n\nreasons:\n{codes}\n" + (
        "\nSamples with pictures are near by --match, texts by their words, videos only by frames and words.\n"
        "Two passes: with --part, run every part until it says complete, or use --wait.\n" + arguments.HELP
    )
    arguments.add_arguments(parser)
    group = parser.add_argument_group("likeness")
    group.add_argument("--distance", type=int, default=6, help="bits of 64 in which near pictures differ (default %(default)s)")
    group.add_argument("--resemblance", type=float, default=0.8, help="overlap of near texts (default %(default)s)")
    group.add_argument("--match", choices=("image", "text", "both"), default="image",
                       help="what makes samples with pictures near (default %(default)s)")  # fmt: skip
    group.add_argument(
        "--keep", choices=("first", "largest"), default="first", help="which of them stays (default %(default)s)"
    )
    group.add_argument("--exact-only", action="store_true", help="same bytes and same words only")
    group.add_argument(
        "--benchmark", type=Path, action="append", default=[], metavar="FILE", help="drop what this corpus contains"
    )
    group.add_argument("--ngram", type=int, default=13, help="words in a row that show contamination (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Run the tool and print its report.

    Raises:
        CorpusError: a limit out of its range, or a benchmark that cannot be read.
    """
    if not 0 <= args.distance <= 11 or not 0 < args.resemblance <= 1 or args.ngram < 1:
        raise CorpusError("--distance from 0 to 11, --resemblance above 0 and at most 1, --ngram at least 1")
    tool = Dedupe(args.distance, args.resemblance, args.match, args.keep, args.exact_only, tuple(args.benchmark), args.ngram)
    load_benchmark(tool.benchmarks, tool.ngram)
    arguments.run_over_corpus(args, tool)
