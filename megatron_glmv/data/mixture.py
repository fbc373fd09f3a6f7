"""Which source each position of the global stream draws from, in closed form.

Positions come in fixed blocks. In every block each source has the same fixed number of positions, in an order that is a seeded
permutation of the block's number, so the shares hold over any stretch of two blocks or more, and "how many rows of this source
came before position p" needs no history.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

BLOCK_POSITIONS = 10_000
"""Positions of one block; the smallest share a source can have is one of them."""


def block_counts(weights: Sequence[float], block: int = BLOCK_POSITIONS) -> tuple[int, ...]:
    """Positions of each source in one block: the largest remainder of its weight, at least one.

    Args:
        weights: positive, in any unit.
        block: positions of a block.

    Raises:
        ValueError: a weight that is not positive and finite, or more sources than positions.
    """
    if not weights or len(weights) > block:
        raise ValueError(f"{len(weights)} sources; a mixture holds 1 to {block}")
    if not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights {tuple(weights)}: every weight must be positive and finite")
    total = math.fsum(weights)
    quotas = [weight / total * block for weight in weights]
    counts = [max(1, math.floor(quota)) for quota in quotas]
    for _ in range(block - sum(counts)):
        counts[max(range(len(counts)), key=lambda source: (quotas[source] - counts[source], -source))] += 1
    for _ in range(sum(counts) - block):
        counts[max(range(len(counts)), key=lambda source: (counts[source] > 1, counts[source] - quotas[source], -source))] -= 1
    return tuple(counts)


class Mixture:
    """Maps a position of the stream to a source and to how many rows of that source came before."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """Args: `weights` of the sources, in any unit; `seed` of the run."""
        self.counts = block_counts(weights)
        self._seed = seed
        self._block = lru_cache(maxsize=4)(self._lay_out)

    def locate(self, position: int) -> tuple[int, int]:
        """(source, k): the position draws the k-th row (from 0) of this source."""
        block, slot = divmod(position, BLOCK_POSITIONS)
        if len(self.counts) == 1:
            return 0, position
        sources, before = self._block(block)
        source = int(sources[slot])
        return source, block * self.counts[source] + int(before[slot])

    def _lay_out(self, block: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """[BLOCK_POSITIONS] source of each slot, and how many slots of the same source come before it in the block."""
        sources = np.repeat(np.arange(len(self.counts)), self.counts)
        # Sorting raw words, because numpy promises the same raw stream in every version, and not the same shuffles.
        words = np.random.PCG64(np.random.SeedSequence([self._seed, block])).random_raw(BLOCK_POSITIONS)
        sources = sources[np.argsort(words, kind="stable")]
        before = np.empty(BLOCK_POSITIONS, dtype=np.int64)
        for source, count in enumerate(self.counts):
            before[sources == source] = np.arange(count)
        return sources, before
