"""Rows that are full and cost alike: built one after the other towards the mean, then evened out by exchanges.

Best fit fills rows but lets chance, or worse, the order of sizes decide which pictures meet: long pictures come together with
long pictures. Here a row begins with the largest sample that is left, and what follows is taken from the samples whose cost a
token comes nearest to what the row still lacks, so that dense samples share rows with sparse ones. Samples of equal size then
change places between rows, the costliest going to the row with the cheapest rest, which lowers the variance and moves no token.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

CLASSES = 12
"""Classes of samples by cost a token, of equal tokens each."""
SHORT_SHARE = 8
"""Samples of at most 1/8 of a row are short: they are drawn at random, larger ones by size."""
FILLERS = 0.5
"""Of the smallest samples, one a row, half are kept to fill the ends of rows: sparse, they would all be used up early."""
SWEEPS = 4
"""Times that every size is exchanged; each later sweep gains a tenth of the one before."""
SMALLEST_GROUP = 4
"""Samples of one size that are worth an exchange."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def build_rows(sizes: Ints, room: int, extra: Floats, loads: Ints, budget: int, random: np.random.Generator) -> list[list[int]]:
    """Put samples into rows whose costs are near the mean.

    Args:
        sizes: [n] room that each sample takes, at least 1.
        room: of a row.
        extra: [n] cost of each sample beyond its size, any unit.
        loads: [n] patches of each sample, zeros where there is no limit.
        budget: most patches in a row.
        random: decides which short samples meet.

    Returns:
        For each row the indexes of its samples; every sample is in exactly one row.
    """
    stock = _Stock(sizes, room, extra, loads, random)
    rows = []
    while stock.num_left:
        rows.append(stock.fill_row(budget))
    return rows


class _Stock:
    """The samples not yet placed, by class of density and by size; `masks` has a bit for every size that a class holds."""

    def __init__(self, sizes: Ints, room: int, extra: Floats, loads: Ints, random: np.random.Generator) -> None:
        density = extra / sizes
        order = np.argsort(density, kind="stable")
        before = np.cumsum(sizes[order]) - sizes[order]
        classes = np.empty(len(sizes), dtype=np.int64)
        classes[order] = before * CLASSES // max(int(sizes.sum()), 1)
        held = np.maximum(np.bincount(classes, sizes, CLASSES), 1)
        centres = (np.bincount(classes, extra, CLASSES) / held).tolist()
        self._middles = sorted((low + high) / 2 for low, high in pairwise(centres))
        self._nearest = [np.argsort(np.abs(np.arange(CLASSES) - kind), kind="stable").tolist() for kind in range(CLASSES)]
        self._room, self._short = room, max(1, room // SHORT_SHARE)
        self._sizes, self._extra, self._loads = sizes.tolist(), extra.tolist(), loads.tolist()
        self._classes = classes.tolist()
        self._used = bytearray(len(sizes))
        self._by_size: list[dict[int, list[int]]] = [{} for _ in range(CLASSES)]
        self._counts: list[dict[int, int]] = [{} for _ in range(CLASSES)]
        self._shuffled: list[list[int]] = [[] for _ in range(CLASSES)]
        self._masks = [0] * CLASSES
        num_rows = min(len(sizes) - 1, int(sizes.sum()) // room)
        is_filler = (sizes <= np.partition(sizes, num_rows)[num_rows]) & (random.random(len(sizes)) < FILLERS)
        for sample in random.permutation(len(sizes)).tolist():
            kind, size = self._classes[sample], self._sizes[sample]
            self._by_size[kind].setdefault(size, []).append(sample)
            if size <= self._short and not is_filler[sample]:
                self._shuffled[kind].append(sample)
        for kind, held_sizes in enumerate(self._by_size):
            self._counts[kind] = {size: len(samples) for size, samples in held_sizes.items()}
            self._masks[kind] = sum(1 << size for size in held_sizes)
        self.num_left = len(self._sizes)
        self._extra_left, self._room_left = float(extra.sum()), int(sizes.sum())

    def fill_row(self, budget: int) -> list[int]:
        """Take the samples of one row out of the stock."""
        target = self._extra_left / self._room_left * self._room
        row: list[int] = []
        room, extra = self._room, 0.0
        sample = self._take_largest()
        while sample >= 0:
            row.append(sample)
            room -= self._sizes[sample]
            extra += self._extra[sample]
            budget -= self._loads[sample]
            if not room or not self.num_left:
                break
            wanted = bisect(self._middles, (target - extra) / room)
            sample = self._take(self._nearest[wanted], wanted, room, budget)
        self._extra_left -= extra
        self._room_left = max(1, self._room_left - (self._room - room))
        return row

    def _take_largest(self) -> int:
        kind = max(range(CLASSES), key=lambda kind: self._masks[kind].bit_length())
        return self._take_sized(kind, self._masks[kind].bit_length() - 1, None)

    def _take(self, kinds: Sequence[int], wanted: int, room: int, budget: int) -> int:
        """The next sample of a row, from the nearest class that has one; -1 when nothing fits."""
        fits = (1 << (room + 1)) - 1
        if room <= self._short:
            return self._take_last(kinds, wanted, room, budget)
        for kind in kinds:
            size = (self._masks[kind] & fits).bit_length() - 1
            sample = self._take_sized(kind, size, budget) if size > self._short else self._take_short(kind, budget)
            if sample >= 0:
                return sample
        return self._take_last(kinds, wanted, room, budget)

    def _take_last(self, kinds: Sequence[int], wanted: int, room: int, budget: int) -> int:
        """What fills the end of a row: the larger the better, a farther class only for a gain that is worth it."""
        fits = (1 << (room + 1)) - 1
        offers: list[tuple[int, int]] = []
        for kind in kinds:
            size = (self._masks[kind] & fits).bit_length() - 1
            worth = max(1, abs(kind - wanted) * room // (4 * CLASSES))
            if size > 0 and (not offers or size - offers[-1][1] > worth):
                offers.append((kind, size))
            if size == room:
                break
        for kind, size in reversed(offers):
            sample = self._take_sized(kind, size, budget)
            if sample >= 0:
                return sample
        return -1

    def _take_sized(self, kind: int, size: int, budget: int | None) -> int:
        held = self._by_size[kind][size]
        while self._used[held[-1]]:
            held.pop()
        if budget is not None and self._loads[held[-1]] > budget:
            return -1
        return self._use(held.pop())

    def _take_short(self, kind: int, budget: int) -> int:
        held = self._shuffled[kind]
        while held and self._used[held[-1]]:
            held.pop()
        if not held or self._loads[held[-1]] > budget:
            return -1
        return self._use(held.pop())

    def _use(self, sample: int) -> int:
        kind, size = self._classes[sample], self._sizes[sample]
        self._used[sample] = 1
        self._counts[kind][size] -= 1
        if not self._counts[kind][size]:
            self._masks[kind] ^= 1 << size
        self.num_left -= 1
        return sample


def exchange(rows: Sequence[Sequence[int]], sizes: Ints, extra: Floats, loads: Ints, budget: int) -> list[list[int]]:
    """Let samples of equal size change places so that rows cost alike.

    Args:
        rows: indexes of the samples of each row.
        sizes: [n] room that each sample takes; what a row holds of it does not change.
        extra: [n] cost of each sample beyond its size.
        loads: [n] patches of each sample.
        budget: most patches in a row; an exchange that would exceed it is not made.

    Returns:
        The rows, in the same order.
    """
    row_of = np.empty(len(sizes), dtype=np.int64)
    for number, row in enumerate(rows):
        row_of[list(row)] = number
    costs = np.bincount(row_of, extra, len(rows))
    held = np.bincount(row_of, loads, len(rows)).astype(np.int64)
    order = np.argsort(sizes, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(sizes[order])) + 1)
    groups = [group for group in reversed(groups) if len(group) >= SMALLEST_GROUP]
    for sweep in range(SWEEPS):
        for group in groups:
            # One sample a row and exchange; which one of several changes from sweep to sweep.
            places = np.roll(group, sweep * len(group) // SWEEPS)
            own, first = np.unique(row_of[places], return_index=True)
            samples = places[first]
            rest, spare = costs[own] - extra[samples], held[own] - loads[samples]
            given = np.empty_like(samples)
            given[np.argsort(-rest, kind="stable")] = samples[np.argsort(extra[samples], kind="stable")]
            if (spare + loads[given] <= budget).all():
                costs[own], held[own], row_of[given] = rest + extra[given], spare + loads[given], own
    order = np.argsort(row_of, kind="stable")
    counts = np.bincount(row_of, minlength=len(rows))
    return [part.tolist() for part in np.split(order, np.cumsum(counts)[:-1])]


def step_cost(rows: Sequence[Sequence[int]], room: int, extra: Floats, peers: int = 8) -> float:
    """What all rows cost when `peers` of them, drawn at random, always wait for the costliest of them.

    Args:
        rows: indexes of the samples of each row.
        room: of a row; its padding is computed like tokens.
        extra: [n] cost of each sample beyond its size, in the unit of room.
        peers: rows that wait for each other.
    """
    costs = np.sort([room + float(extra[list(row)].sum()) for row in rows])
    share = (np.arange(len(costs) + 1) / max(len(costs), 1)) ** peers
    return len(costs) * float((costs * np.diff(share)).sum())
