"""The global order of rows: a pure function of seed and step, whatever the number of replicas, workers and restarts.

Position p = step x global_batch_rows + i names one row of one source. The state of the data stream is therefore the step alone,
a resumed run reads the same bytes, and the number of data-parallel replicas may change in between. What the
order depends on is described, so that a run can tell whether it goes on in the same one (training/data_order.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_glmv.data.deal import deal_rows
from megatron_glmv.data.mixture import Mixture

ROUNDS = 6
"""Feistel rounds; four are enough to look random, two more are cheap."""
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Draw:
    """One row of the stream: `row` of source number `source`, in this source's pass number `epoch`."""

    source: int
    row: int
    epoch: int


@lru_cache(maxsize=256)
def permutation_keys(seed: int, name: str, epoch: int) -> tuple[int, ...]:
    """Keys of one epoch's permutation of one source; the name enters by a hash that is the same in every process."""
    hashed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    words = np.random.SeedSequence([seed, hashed, epoch]).generate_state(ROUNDS, np.uint64)
    return tuple(int(word) for word in words)


def permute(index: int, size: int, keys: Sequence[int]) -> int:
    """Where a keyed permutation of 0 .. size - 1 sends `index`.

    A Feistel network over the next power of four, walked until it lands inside: no table is kept, so a source of a billion
    rows costs no memory, and integer arithmetic alone decides, so the order does not depend on a library's version.

    Args:
        index: 0 .. size - 1.
        size: of the permuted range.
        keys: one 64-bit word a round.
    """
    half = max(4, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (_scramble(right ^ key) & mask)
        index = left << half | right
        if index < size:
            return index


def _scramble(word: int) -> int:
    """The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    word = (word + 0x9E3779B97F4A7C15) & MASK
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & MASK
    return word ^ word >> 31


class GlobalOrder:
    """The rows of every step, for all replicas together or for one of them."""

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float],
        sizes: Sequence[int],
        *,
        seed: int,
        global_batch_rows: int,
        shuffle: bool = True,
        cost_of: Callable[[Draw], float] | None = None,
    ) -> None:
        """Describe the stream.

        Args:
            names: of the sources; they seed the permutations, so renaming a source changes its order.
            weights: shares of the sources, in any unit.
            sizes: rows of each source.
            seed: of the run, 0 or more.
            global_batch_rows: rows of one step over all replicas.
            shuffle: permute each source anew every epoch; false keeps the order on disk.
            cost_of: what a row costs, in any unit: replicas are dealt rows that cost alike; None: they take them in order.

        Raises:
            ValueError: a source without rows, or weights that make no mixture.
        """
        if not all(size > 0 for size in sizes):
            raise ValueError(f"source {names[list(sizes).index(0)]!r} holds no row")
        self._names, self._sizes = tuple(names), tuple(sizes)
        self._mixture = Mixture(weights, seed)
        self._seed, self._shuffle, self._cost_of = seed, shuffle, cost_of
        self.global_batch_rows = global_batch_rows
        sources = zip(names, weights, sizes, strict=True)
        self.description: dict[str, Any] = {
            "global_batch_rows": global_batch_rows,
            "seed": seed,
            "shuffle": shuffle,
            "sources": {name: {"weight": weight, "rows": rows} for name, weight, rows in sources},
        }
        """What it depends on, as JSON."""

    def at(self, position: int) -> Draw:
        """The row at one position of the stream."""
        source, drawn = self._mixture.locate(position)
        size = self._sizes[source]
        epoch, row = divmod(drawn, size)
        if self._shuffle:
            row = permute(row, size, permutation_keys(self._seed, self._names[source], epoch))
        return Draw(source, row, epoch)

    def step(self, step: int, data_rank: int = 0, data_size: int = 1) -> tuple[Draw, ...]:
        """The rows of one step that replica `data_rank` of `data_size` takes, in the order of the global batch.

        Raises:
            ValueError: the global batch does not divide by the replicas.
        """
        share, rest = divmod(self.global_batch_rows, data_size)
        if rest:
            raise ValueError(f"a global batch of {self.global_batch_rows} rows does not divide by {data_size} replicas")
        start = step * self.global_batch_rows
        if data_size == 1 or self._cost_of is None:
            return tuple(self.at(start + data_rank * share + number) for number in range(share))
        draws = [self.at(start + number) for number in range(self.global_batch_rows)]
        costs = [self._cost_of(draw) for draw in draws]
        return tuple(draws[number] for number in deal_rows(costs, data_size)[data_rank])
