"""Hashes that are close where pictures or texts are, and joins that find close ones without comparing all with all.

Pictures: the signs of the 64 lowest frequencies of a 32 x 32 grey picture; near means few bits differ. A hash is cut into four
bands: two hashes at distance d agree in one band up to d // 4 bits, so looking up every band with that many bits flipped finds
every pair. Texts: MinHash over runs of five characters (which works without spaces between words), joined by bands of it.

Source: Zauner, "Implementation and benchmarking of perceptual image hash functions" (2010); Broder, "On the resemblance and
containment of documents" (1997); Norouzi et al., "Fast search in Hamming space with multi-index hashing" (2012).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from itertools import chain, combinations

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
SIDE, KEPT = 32, 8
SHINGLE = 5
NUM_HASHES = 64
ROWS = 4
"""Hashes of a text band; 16 bands find a pair of resemblance 0.8 with probability 0.9998, one of 0.3 with 0.12."""
BANDS = 4
"""Bands of 16 bits of a picture's hash."""
PAIRS = 1 << 18
"""Candidate pairs that are in memory at once."""
SMALL_BUCKET = 64
"""Texts of one band that are compared all with all; in larger buckets each is compared with the first. A hash is
compared with all of a bucket that is no larger, connected already or not."""

_rows, _columns = np.arange(KEPT)[:, None], np.arange(SIDE)[None]
_COSINES = np.cos(np.pi * _rows * (2 * _columns + 1) / (2 * SIDE))
_mixer = np.random.default_rng(20_250_701)
_FACTORS: U64 = _mixer.integers(1, 1 << 63, NUM_HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_SHIFTS: U64 = _mixer.integers(0, 1 << 63, NUM_HASHES, dtype=np.uint64)
_POWERS: U64 = np.array([pow(0x9E3779B97F4A7C15, place, 1 << 64) for place in range(SHINGLE)], dtype=np.uint64)
_WORD = re.compile(r"[^\W_]+", re.UNICODE)
_WIDE = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af])")


def hash_picture(picture: Image.Image) -> int:
    """64 bits that change little when a picture is scaled, compressed or brightened."""
    grey = np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0), dtype=np.float64)
    waves = (_COSINES @ grey @ _COSINES.T).ravel()
    bits = waves > np.median(waves[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def normalise_text(text: str) -> str:
    """Words in lower case with single spaces, characters in their compatible form, no punctuation."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).lower()))


def split_words(text: str) -> list[str]:
    """Words of a normalised text; characters of scripts without spaces are words."""
    return _WIDE.sub(r" \1 ", text).split()


def hash_text(text: str) -> npt.NDArray[np.uint32]:
    """[64] uint32: the share of equal entries estimates how much two normalised texts overlap (standard error 0.05 at 0.8)."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    if len(points) < SHINGLE:
        points = np.concatenate([points, np.zeros(SHINGLE - len(points), np.uint64)])
    runs = np.lib.stride_tricks.sliding_window_view(points + np.uint64(1), SHINGLE)
    shingles = np.unique((runs * _POWERS).sum(axis=1, dtype=np.uint64))
    shingles ^= shingles >> np.uint64(29)
    smallest = np.full(NUM_HASHES, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(shingles), 1 << 14):
        block = shingles[start : start + (1 << 14), None] * _FACTORS + _SHIFTS
        smallest = np.minimum(smallest, block.min(axis=0))
    return (smallest >> np.uint64(32)).astype(np.uint32)


def hash_grams(words: list[str], size: int) -> U64:
    """One hash for each run of `size` words; none for fewer words."""
    grams = (" ".join(words[start : start + size]) for start in range(len(words) - size + 1))
    digests = b"".join(hashlib.blake2b(gram.encode(), digest_size=8).digest() for gram in grams)
    return np.frombuffer(digests, dtype=np.uint64)


class Clusters:
    """Which of many things the pairs seen so far connect.

    Attributes:
        labels: [count] int64, equal for things that are connected, as of the last `settle`.
        version: counts the times that labels changed.
    """

    def __init__(self, count: int) -> None:
        """Begin with `count` things, none of them connected."""
        self.labels = np.arange(count)
        self.version = 0
        self._waiting: list[tuple[I64, I64]] = []
        self._num_waiting, self._most_waiting = 0, max(PAIRS // 4, count // 8)

    def join(self, left: I64, right: I64) -> None:
        """Connect pairs; what is connected already takes no memory, and the rest little before it is settled."""
        is_new = self.labels[left] != self.labels[right]
        self._waiting.append((left[is_new], right[is_new]))
        self._num_waiting += len(self._waiting[-1][0])
        if self._num_waiting >= self._most_waiting:
            self.settle()

    def settle(self) -> I64:
        """Labels that count every pair so far."""
        if self._num_waiting:
            left, right = (self.labels[np.concatenate(side)] for side in zip(*self._waiting, strict=True))
            graph = coo_array((np.ones(len(left)), (left, right)), shape=(len(self.labels),) * 2)
            self.labels = connected_components(graph, directed=False)[1].astype(np.int64)[self.labels]
            self.version += 1
        self._waiting, self._num_waiting = [], 0
        return self.labels


def near_hashes(
    hashes: U64, distance: int, groups: I64 | None = None, clusters: Clusters | None = None
) -> Iterator[tuple[I64, I64]]:
    """Every pair of hashes that differ in at most `distance` bits.

    Args:
        hashes: [n] uint64, or [n, columns]: near in every column, joined by the last.
        distance: in bits, 0 to 11.
        groups: [n] numbers from 0: only pairs within a group.
        clusters: what the caller joins with the pairs that it is given; pairs that are connected by then are left out.

    Yields:
        indexes of pairs; a pair may come more than once.
    """
    table = hashes.reshape(len(hashes), -1)
    clusters = clusters or Clusters(len(table))
    flips = [sum(1 << bit for bit in bits) for count in range(distance // BANDS + 1) for bits in combinations(range(16), count)]
    joined = np.ascontiguousarray(table[:, -1])
    for band in range(BANDS):
        values = ((joined >> np.uint64(16 * band)) & np.uint64(0xFFFF)).astype(np.int64)
        if groups is not None:
            values |= groups << 16
        buckets = _Buckets(values)
        del values
        for flip in flips:
            for left, right in buckets.pairs(flip, clusters) if flip else buckets.own_pairs(clusters):
                near = np.bitwise_count(joined[left] ^ joined[right]) <= distance
                left, right = left[near], right[near]
                if table.shape[1] > 1:
                    near = (np.bitwise_count(table[left] ^ table[right]) <= distance).all(axis=1)
                    left, right = left[near], right[near]
                yield np.minimum(left, right), np.maximum(left, right)


class _Buckets:
    """Things by value, sorted by it and then by label, so that those of a bucket that are connected stand side by side."""

    def __init__(self, values: I64) -> None:
        """Take the value of each thing."""
        self._keys, self._buckets = np.unique(values, return_inverse=True)
        self._version = -1

    def own_pairs(self, clusters: Clusters) -> Iterator[tuple[I64, I64]]:
        """Pairs in one bucket that are not connected; what they connect in between counts at once."""
        rest = np.arange(len(self._buckets))
        while len(rest):
            rest, ranks, ends = self._sort(rest, clusters.labels)
            version = clusters.version
            # Each is compared with those behind it, less those with its label.
            for left, places in _expand(np.searchsorted(ranks, ranks, "right"), ends[self._buckets[rest] + 1]):
                yield rest[left], rest[places]
                if clusters.version != version:
                    rest = rest[left[-1] + 1 :]
                    break
            else:
                return

    def pairs(self, flip: int, clusters: Clusters) -> Iterator[tuple[I64, I64]]:
        """Pairs of which the values differ in the bits of `flip`, as `own_pairs`."""
        wanted = self._keys ^ flip
        targets = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        # Of two buckets the one of the smaller value asks.
        asks = (self._keys[targets] == wanted) & (self._keys < wanted)
        rest = np.flatnonzero(asks[self._buckets])
        while len(rest):
            if clusters.version != self._version:
                self._order, self._ranks, self._ends = self._sort(np.arange(len(self._buckets)), clusters.labels)
                self._version = clusters.version
            found = targets[self._buckets[rest]]
            starts, ends, width = self._ends[found], self._ends[found + 1], 1
            large = np.flatnonzero(ends - starts > SMALL_BUCKET)
            if len(large):
                # Two ranges for each: of its target those before its label, and those behind it.
                own = found[large] * len(self._buckets) + clusters.labels[rest[large]]
                starts, ends, width = np.repeat(starts, 2), np.repeat(ends, 2), 2
                starts[1::2] = ends[1::2]
                ends[2 * large] = np.searchsorted(self._ranks, own)
                starts[2 * large + 1] = np.searchsorted(self._ranks, own, "right")
            for left, places in _expand(starts, ends):
                yield rest[left if width == 1 else left // 2], self._order[places]
                if clusters.version != self._version:
                    rest = rest[(left[-1] + 1) // width :]
                    break
            else:
                return

    def _sort(self, things: I64, labels: I64) -> tuple[I64, I64, I64]:
        """Things by bucket and label; bucket * n + label of each; the place where each bucket begins, and the end."""
        count = len(self._buckets)
        ranks = self._buckets[things] * count + labels[things]
        order = np.argsort(ranks, kind="stable")
        ranks = ranks[order]
        return things[order], ranks, np.searchsorted(ranks, np.arange(len(self._keys) + 1) * count)


def near_texts(signatures: npt.NDArray[np.uint32], resemblance: float) -> Iterator[tuple[I64, I64]]:
    """Pairs of texts whose signatures agree in at least this share; nearly every one (see ROWS).

    Args:
        signatures: [n, 64] of hash_text.
        resemblance: 0 to 1.

    Yields:
        indexes of pairs; a pair may come more than once.
    """
    for band in range(0, NUM_HASHES, ROWS):
        rows = np.ascontiguousarray(signatures[:, band : band + ROWS]).view(np.uint64)
        order = np.lexsort(rows.T)
        differs = (rows[order[1:]] != rows[order[:-1]]).any(axis=1)
        starts = np.concatenate([[0], np.flatnonzero(differs) + 1, [len(rows)]])
        sizes = np.diff(starts)
        first = np.repeat(starts[:-1], sizes)
        places = np.arange(len(rows))
        low = np.where(np.repeat(sizes, sizes) <= SMALL_BUCKET, first, np.maximum(places - 1, first))
        for left, right in chain(_expand(low, places, PAIRS // 16), _expand(first, np.minimum(first + 1, places), PAIRS // 16)):
            a, b = order[left], order[right]
            close = (signatures[a] == signatures[b]).mean(axis=1) >= resemblance
            yield a[close], b[close]


def label_clusters(count: int, pairs: Iterator[tuple[I64, I64]], clusters: Clusters | None = None) -> I64:
    """[count] int64: equal for those that a chain of pairs connects; `clusters` is joined with them on the way."""
    clusters = clusters or Clusters(count)
    for left, right in pairs:
        clusters.join(left, right)
    return clusters.settle()


def label_hashes(hashes: U64, distance: int) -> I64:
    """[n] int64: equal for rows of [n, columns] that a chain connects whose neighbours are near in every column.

    Columns are joined one by one, each among those that the ones before it connect, so that very many rows that are alike in
    one column alone are not compared with each other.
    """
    groups = np.zeros(len(hashes), np.int64)
    for column in range(hashes.shape[1] - 1):
        values, inverse = np.unique(np.stack([groups.astype(np.uint64), hashes[:, column]], 1), axis=0, return_inverse=True)
        groups = _label(values[:, 1:], distance, values[:, 0].astype(np.int64))[inverse.reshape(-1)]
    return _label(hashes, distance, groups)


def _label(hashes: U64, distance: int, groups: I64) -> I64:
    clusters = Clusters(len(hashes))
    return label_clusters(len(hashes), near_hashes(hashes, distance, groups, clusters), clusters)


def find_equal(signatures: npt.NDArray[np.uint32]) -> tuple[I64, I64]:
    """Which rows of [n, 64] are the first with their contents, ascending, and for each row which of those it equals."""
    words = np.ascontiguousarray(signatures).view(np.uint64)
    mixed = np.zeros(len(words), np.uint64)
    for column in range(words.shape[1]):
        mixed = (mixed ^ words[:, column]) * _FACTORS[column]
        mixed ^= mixed >> np.uint64(29)
    order = np.argsort(mixed, kind="stable")
    is_first = np.ones(len(order), dtype=bool)
    for start in range(1, len(order), PAIRS // 16):
        own = order[start - 1 : start + PAIRS // 16]
        is_first[start : start + PAIRS // 16] = (signatures[own[1:]] != signatures[own[:-1]]).any(axis=1)
    firsts = order[is_first]
    which = np.empty(len(order), np.int64)
    which[order] = np.argsort(np.argsort(firsts))[np.cumsum(is_first) - 1]
    return np.sort(firsts), which


def _expand(starts: I64, ends: I64, most: int = 0) -> Iterator[tuple[I64, I64]]:
    """(i, place) for every place from starts[i] to ends[i], about `most` at a time, or PAIRS; no piece is empty."""
    most = most or PAIRS
    counts = np.maximum(ends - starts, 0)
    totals = np.cumsum(counts)
    first = 0
    while first < len(counts):
        base = int(totals[first - 1]) if first else 0
        last = max(int(np.searchsorted(totals, base + most, side="right")), first + 1)
        own = counts[first:last]
        left = np.repeat(np.arange(first, last), own)
        within = np.arange(len(left)) - np.repeat(np.cumsum(own) - own, own)
        if len(left):
            yield left, starts[left] + within
        first = last
