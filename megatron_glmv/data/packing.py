"""Which samples share a row: deterministic bin packing under a budget of tokens and, optionally, one of patches.

Two ways are tried where the samples' costs are known: best fit, which needs the fewest rows, and rows built towards the mean
cost (`even_rows`), which make the shorter steps; the second is taken unless it needs more rows than it is worth.

In best fit long samples are placed first, longest first, each into the fullest row that still takes it; the many short ones
follow in seeded random order, so that a row mixes tasks instead of collecting samples of one length. Rows are found by the
room that is left in them: the set of occurring rooms is one big integer whose lowest bit above the needed length is the best
fit, so a placement costs about a microsecond for each few thousand tokens of row length, whatever the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_glmv.data.even_rows import build_rows, exchange, step_cost

SHORT_SHARE = 8
"""Samples of at most 1/8 of a row (of either budget) are short."""
LEVELS = 24
"""Classes that rows are kept in by the patches left in them, finer where few are left."""
MORE_ROWS = 1.003
"""Even rows may be this many times those of best fit."""


def pack_lengths(
    lengths: npt.ArrayLike,
    length: int,
    *,
    align: int = 1,
    patches: npt.ArrayLike | None = None,
    max_patches: int | None = None,
    extra: npt.ArrayLike | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Put samples into rows.

    Args:
        lengths: [n] tokens of each sample, at least 1.
        length: tokens of a row.
        align: a sample takes its length rounded up to a multiple of this.
        patches: [n] patches of each sample; needed with max_patches.
        max_patches: most patches in a row, None for no limit.
        extra: [n] what each sample costs beyond its tokens, in tokens (`cost.CostModel`); rows are then made to cost alike.
        seed: decides the order of short samples and of the rows.

    Returns:
        For each row the indexes of its samples, ascending; every sample is in exactly one row. The same arguments give the
        same rows.

    Raises:
        ValueError: a sample exceeds a budget, or has no tokens.
    """
    sizes = -(-np.asarray(lengths, dtype=np.int64) // align)
    room = length // align
    loads = np.zeros_like(sizes) if patches is None or max_patches is None else np.asarray(patches, dtype=np.int64)
    budget = max_patches if max_patches is not None else 0
    _check(sizes, room, loads, budget, align)
    random = np.random.default_rng([seed, len(sizes)])
    rows = _best_fit(sizes, room, loads, budget, _placing_order(sizes, room, loads, budget, random).tolist())
    if extra is not None and len(rows) > 1:
        costs = np.asarray(extra, dtype=np.float64) / align
        even = build_rows(sizes, room, costs, loads, budget, random)
        rows, even = (exchange(found, sizes, costs, loads, budget) for found in (rows, even))
        if len(even) <= MORE_ROWS * len(rows) + 1 and step_cost(even, room, costs) < step_cost(rows, room, costs):
            rows = even
    return [sorted(rows[row]) for row in random.permutation(len(rows))]


def _placing_order(sizes: npt.NDArray[np.int64], room: int, loads: npt.NDArray[np.int64], budget: int,
                   random: np.random.Generator) -> npt.NDArray[np.int64]:  # fmt: skip
    """Long samples, longest first, then short ones in random order."""
    fills = np.maximum(sizes / room, loads / max(budget, 1))
    is_long = fills > 1 / SHORT_SHARE
    shuffled = random.permutation(len(sizes))
    long = shuffled[is_long[shuffled]]
    return np.concatenate([long[np.argsort(-fills[long], kind="stable")], shuffled[~is_long[shuffled]]])


def _check(sizes: npt.NDArray[np.int64], room: int, loads: npt.NDArray[np.int64], budget: int, align: int) -> None:
    for name, values, most in (("tokens", sizes, room), ("patches", loads, budget)):
        if len(values) and int(values.max()) > most:
            worst = int(values.argmax())
            scale = align if name == "tokens" else 1
            raise ValueError(f"sample {worst} takes {int(values[worst]) * scale} {name}, a row has {most * scale}")
    if len(sizes) and int(sizes.min()) < 1:
        raise ValueError(f"sample {int(sizes.argmin())} has no tokens")


def _best_fit(sizes: npt.NDArray[np.int64], room: int, loads: npt.NDArray[np.int64], budget: int,
              order: Sequence[int]) -> list[list[int]]:  # fmt: skip
    """Rows in the order in which they were opened.

    Rows are kept by level of patches left and, within a level, by tokens left; of the fullest rows of every level that has
    enough, the one that leaves least of the scarcer budget unused is taken.
    """
    size_of, load_of = sizes.tolist(), loads.tolist()
    level_of = (LEVELS * np.sqrt(np.arange(budget + 1) / max(budget, 1))).astype(np.int64).tolist()
    top = level_of[budget]
    wanted = np.array([sizes.sum() / room, loads.sum() / max(budget, 1)])
    token_cost, patch_cost = (wanted / max(wanted.sum(), 1e-9) / [room, max(budget, 1)]).tolist()
    rows: list[list[int]] = []
    load_left: list[int] = []
    buckets: list[list[list[int]]] = [[[] for _ in range(room + 1)] for _ in range(top + 1)]
    rooms = [0] * (top + 1)
    for sample in order:
        size, load = size_of[sample], load_of[sample]
        best, found, found_level, found_left = math.inf, -1, 0, 0
        for level in range(level_of[load], top + 1):
            mask = rooms[level] >> size
            if not mask:
                continue
            left = size + (mask & -mask).bit_length() - 1
            row = buckets[level][left][-1]
            cost = token_cost * left + patch_cost * load_left[row]
            if cost < best and load_left[row] >= load:
                best, found, found_level, found_left = cost, row, level, left
        if found < 0:
            found, found_left = len(rows), room
            rows.append([])
            load_left.append(budget)
        else:
            bucket = buckets[found_level][found_left]
            bucket.pop()
            if not bucket:
                rooms[found_level] ^= 1 << found_left
        rows[found].append(sample)
        load_left[found] -= load
        left = found_left - size
        if left > 0:
            level = level_of[load_left[found]]
            buckets[level][left].append(found)
            rooms[level] |= 1 << left
    return rows
