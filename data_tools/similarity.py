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
from itertools import combinations

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

U64 = npt.NDArray[np.uint64]
SIDE, KEPT = 32, 8
SHINGLE = 5
NUM_HASHES = 64
ROWS = 4
"""Hashes of a text band; 16 bands find a pair of resemblance 0.8 with probability 0.9998, one of 0.3 with 0.12."""
BANDS = 4
"""Bands of 16 bits of a picture's hash."""
PAIRS = 1 << 22
"""Candidate pairs that are in memory at once."""
SMALL_BUCKET = 64
"""Texts of one band that are compared all with all; in larger buckets each is compared with the first."""

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


def near_hashes(hashes: U64, distance: int) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Every pair of hashes that differ in at most `distance` bits.

    Args:
        hashes: [n] uint64.
        distance: in bits, 0 to 11.

    Yields:
        indexes of pairs; a pair may come more than once.
    """
    flips = [0, *(sum(1 << bit for bit in bits) for count in range(1, distance // BANDS + 1)
                  for bits in combinations(range(16), count))]  # fmt: skip
    for band in range(BANDS):
        values = ((hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)).astype(np.int64)
        order = np.argsort(values, kind="stable")
        starts = np.searchsorted(values[order], np.arange((1 << 16) + 1))
        for flip in flips:
            wanted = values ^ flip
            for left, places in _expand(starts[wanted], starts[wanted + 1]):
                right = order[places]
                later = right > left
                left, right = left[later], right[later]
                close = np.bitwise_count(hashes[left] ^ hashes[right]) <= distance
                yield left[close], right[close]


def near_texts(
    signatures: npt.NDArray[np.uint32], resemblance: float
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Pairs of texts whose signatures agree in at least this share; nearly every one (see ROWS).

    Args:
        signatures: [n, 64] of hash_text.
        resemblance: 0 to 1.

    Yields:
        indexes of pairs; a pair may come more than once.
    """
    for band in range(0, NUM_HASHES, ROWS):
        rows = np.ascontiguousarray(signatures[:, band : band + ROWS]).view([("", np.uint32)] * ROWS).ravel()
        order = np.argsort(rows, kind="stable")
        starts = np.concatenate([[0], np.flatnonzero(rows[order][1:] != rows[order][:-1]) + 1, [len(rows)]])
        sizes = np.diff(starts)
        first = np.repeat(starts[:-1], sizes)
        places = np.arange(len(rows))
        low = np.where(np.repeat(sizes, sizes) <= SMALL_BUCKET, first, np.maximum(places - 1, first))
        pairs = [*_expand(low, places), *_expand(first, np.minimum(first + 1, places))]
        for left, right in pairs:
            a, b = order[left], order[right]
            close = (signatures[a] == signatures[b]).mean(axis=1) >= resemblance
            yield a[close], b[close]


def label_clusters(count: int, pairs: Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]) -> npt.NDArray[np.int64]:
    """[count] int64: equal for those that a chain of pairs connects."""
    found = [np.stack(pair) for pair in pairs if len(pair[0])]
    edges = np.unique(np.concatenate(found, axis=1), axis=1) if found else np.empty((2, 0), np.int64)
    graph = coo_array((np.ones(edges.shape[1], np.int8), (edges[0], edges[1])), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _expand(
    starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """(i, place) for every place from starts[i] to ends[i], some millions at a time."""
    counts = np.maximum(ends - starts, 0)
    totals = np.cumsum(counts)
    first = 0
    while first < len(counts):
        base = int(totals[first - 1]) if first else 0
        last = max(int(np.searchsorted(totals, base + PAIRS, side="right")), first + 1)
        own = counts[first:last]
        left = np.repeat(np.arange(first, last), own)
        within = np.arange(len(left)) - np.repeat(np.cumsum(own) - own, own)
        yield left, starts[left] + within
        first = last
