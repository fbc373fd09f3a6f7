"""Which answers share a row, and which rows a data rank takes: few micro-steps, as many on every rank, and even work.

All ranks must run equally many micro-steps, because their pipelines and collectives do. First the fewest rows that hold the
answers are found by best-fit packing, which fixes the number of micro-steps. Then the answers are dealt anew into that many
rows of every rank, the largest load first, to the rank of least load that has a row with room (longest processing time first).
Where that does not fit, the rows of the packing are dealt as they are. Last, answers are moved and swapped between the most and
the least loaded rank while that helps. Everything is a function of the arguments, so ranks agree without talking.

Source: arXiv 2507.01006, section 5.4 (balance by length and compute, repacking into fixed rows); how, is not disclosed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_glmv.data.packing import pack_lengths

PACKINGS = 4
"""Random orders of short answers that the packing tries while it misses the lower bound of micro-steps."""
MAX_EXCHANGES = 400
MAX_CANDIDATES = 512
"""Answers of one rank, the largest loads, that an exchange considers."""
EVEN_ENOUGH = 1e-3
"""Exchanges end when the most loaded rank has less than this share over the mean."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Plan = tuple[tuple[tuple[int, ...], ...], ...]
"""For each data rank, for each of its micro-steps, the answers of the row; () is a row of padding."""


@dataclass(frozen=True)
class Items:
    """What is dealt. n answers.

    Attributes:
        sizes: [n] tokens, rounded up to the alignment.
        patches: [n]; zeros where patches are not limited.
        loads: [n] work, in any unit.
        row_tokens: tokens that a row holds.
        row_patches: patches that a row holds.
    """

    sizes: Ints
    patches: Ints
    loads: Floats
    row_tokens: int
    row_patches: int


def plan_rows(
    tokens: npt.ArrayLike,
    loads: npt.ArrayLike,
    *,
    num_ranks: int,
    row_length: int,
    align: int = 1,
    patches: npt.ArrayLike | None = None,
    max_patches: int | None = None,
    multiple: int = 1,
) -> Plan:
    """Deal answers to ranks and rows.

    Args:
        tokens: [n] of each answer with its prompt.
        loads: [n] work that an answer adds to its rank beyond what a row costs anyway, 0 or more, in any unit.
        num_ranks: data-parallel ranks.
        row_length: tokens of a row.
        align: an answer takes its tokens rounded up to a multiple of this.
        patches: [n]; needed with max_patches.
        max_patches: most patches in a row.
        multiple: of which the number of micro-steps must be; an interleaved pipeline needs one.

    Returns:
        The plan: every answer once, equally many rows on every rank, at least `multiple`.

    Raises:
        ValueError: an answer exceeds a row, or has no tokens.
    """
    lengths = np.asarray(tokens, dtype=np.int64)
    limited = patches is not None and max_patches is not None
    items = Items(
        sizes=-(-lengths // align) * align,
        patches=np.asarray(patches, dtype=np.int64) if limited else np.zeros_like(lengths),
        loads=np.asarray(loads, dtype=np.float64),
        row_tokens=row_length // align * align,
        row_patches=max_patches if limited and max_patches is not None else 0,
    )
    unit = num_ranks * multiple
    packed = _pack(items, unit)
    rows = -(-max(len(packed), 1) // unit) * multiple
    deals = [
        _deal(items, np.lexsort((-items.sizes, -items.loads)), num_ranks, rows),
        _deal(items, np.lexsort((-items.loads, -items.sizes)), num_ranks, rows),
        _deal_rows(items, packed, num_ranks, rows),
    ]
    fitting = [deal for deal in deals if deal is not None]
    for deal in fitting:
        _exchange(items, deal)
    best = min(fitting, key=lambda deal: _most_loaded(items, deal))
    return tuple(_in_order(items, rank) for rank in best)


def skew(values: Sequence[float]) -> float:
    """The largest over the mean, 1 where all are equal or zero."""
    mean = sum(values) / len(values)
    return max(values) / mean if mean > 0 else 1.0


def _pack(items: Items, unit: int) -> list[list[int]]:
    """Rows by best fit; of several random orders the first that needs no more micro-steps than the contents do."""
    fewest = max(_share(items.sizes, items.row_tokens), _share(items.patches, items.row_patches), 1)
    best: list[list[int]] = []
    for seed in range(PACKINGS):
        rows = pack_lengths(
            items.sizes,
            items.row_tokens,
            patches=items.patches if items.row_patches else None,
            max_patches=items.row_patches or None,
            seed=seed,
        )
        if not best or len(rows) < len(best):
            best = rows
        if -(-len(best) // unit) <= -(-fewest // unit):
            break
    return best


def _share(amounts: Ints, room: int) -> int:
    return -(-int(amounts.sum()) // room) if room else 0


def _most_loaded(items: Items, deal: list[list[list[int]]]) -> float:
    return max(_load(items, rank) for rank in deal)


def _load(items: Items, rank: Iterable[Sequence[int]]) -> float:
    return float(sum(items.loads[list(row)].sum() for row in rank))


def _deal(items: Items, order: Ints, num_ranks: int, rows: int) -> list[list[list[int]]] | None:
    """Answers in `order`, each to the rank of least load that has room, there into the fullest row; None: one did not fit."""
    tokens_left = np.full((num_ranks, rows), items.row_tokens)
    patches_left = np.full((num_ranks, rows), items.row_patches)
    carried = np.zeros(num_ranks)
    deal: list[list[list[int]]] = [[[] for _ in range(rows)] for _ in range(num_ranks)]
    for item in order.tolist():
        size, patches = items.sizes[item], items.patches[item]
        fits = (tokens_left >= size) & (patches_left >= patches)
        open_ranks = fits.any(1)
        if not open_ranks.any():
            return None
        rank = int(np.where(open_ranks, carried, np.inf).argmin())
        row = int(np.where(fits[rank], tokens_left[rank], items.row_tokens + 1).argmin())
        deal[rank][row].append(item)
        tokens_left[rank, row] -= size
        patches_left[rank, row] -= patches
        carried[rank] += items.loads[item]
    return deal


def _deal_rows(items: Items, packed: list[list[int]], num_ranks: int, rows: int) -> list[list[list[int]]]:
    """Whole rows, the largest load first, each to the rank of least load that has a place."""
    deal: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    carried = [0.0] * num_ranks
    for load, row in sorted(((float(items.loads[row].sum()), row) for row in packed), key=lambda pair: -pair[0]):
        rank = min((rank for rank in range(num_ranks) if len(deal[rank]) < rows), key=lambda rank: (carried[rank], rank))
        deal[rank].append(list(row))
        carried[rank] += load
    for rank_rows in deal:
        rank_rows.extend([] for _ in range(rows - len(rank_rows)))
    return deal


def _exchange(items: Items, deal: list[list[list[int]]]) -> None:
    """Even the ranks' loads in place: the most loaded rank gives to, or swaps with, the least loaded one that can help."""
    carried = [_load(items, rank) for rank in deal]
    mean = sum(carried) / len(carried)
    for _ in range(MAX_EXCHANGES):
        heavy = max(range(len(deal)), key=lambda rank: (carried[rank], -rank))
        if carried[heavy] <= mean * (1 + EVEN_ENOUGH):
            return
        for light in sorted(range(len(deal)), key=lambda rank: (carried[rank], rank)):
            moved = _exchange_pair(items, deal[heavy], deal[light], carried[heavy] - carried[light])
            if moved:
                carried[heavy] -= moved
                carried[light] += moved
                break
        else:
            return


def _exchange_pair(items: Items, heavy: list[list[int]], light: list[list[int]], gap: float) -> float:
    """Make the one exchange that brings the difference `gap` of two ranks' loads closest to zero; returns the load moved."""
    ours, our_rows, our_left = _candidates(items, heavy)
    theirs, their_rows, their_left = _candidates(items, light)
    # A swap with nothing, in each row of the lighter rank, is a move.
    count = len(light)
    theirs, their_rows = np.concatenate((theirs, np.full(count, -1))), np.concatenate((their_rows, np.arange(count)))
    given = [np.where(theirs < 0, 0, values[theirs]) for values in (items.loads, items.sizes, items.patches)]
    moved = items.loads[ours][:, None] - given[0][None, :]
    allowed = (moved > 1e-9 * gap) & (moved < (1 - 1e-9) * gap)
    for values, other, left, their in ((items.sizes, given[1], our_left[0], their_left[0]),
                                       (items.patches, given[2], our_left[1], their_left[1])):  # fmt: skip
        change = values[ours][:, None] - other[None, :]
        allowed &= (left[our_rows][:, None] + change >= 0) & (their[their_rows][None, :] - change >= 0)
    if not allowed.any():
        return 0.0
    place = int(np.where(allowed, np.abs(moved - gap / 2), np.inf).argmin())
    one, two = divmod(place, len(theirs))
    ours_row, theirs_row = heavy[int(our_rows[one])], light[int(their_rows[two])]
    ours_row.remove(int(ours[one]))
    theirs_row.append(int(ours[one]))
    if theirs[two] >= 0:
        theirs_row.remove(int(theirs[two]))
        ours_row.append(int(theirs[two]))
    return float(moved[one, two])


def _candidates(items: Items, rank: list[list[int]]) -> tuple[Ints, Ints, tuple[Ints, Ints]]:
    """A rank's answers of largest load, the row of each, and the tokens and patches left in every row."""
    answers = np.array([item for row in rank for item in row], dtype=np.int64)
    rows = np.repeat(np.arange(len(rank)), [len(row) for row in rank])
    chosen = np.argsort(-items.loads[answers], kind="stable")[:MAX_CANDIDATES]
    tokens = np.array([items.row_tokens - items.sizes[row].sum() for row in rank], dtype=np.int64)
    patches = np.array([items.row_patches - items.patches[row].sum() for row in rank], dtype=np.int64)
    return answers[chosen], rows[chosen], (tokens, patches)


def _in_order(items: Items, rank: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    """The largest row first, so that ranks meet rows of like work in the same micro-step; rows of padding last."""
    rows = [tuple(sorted(row)) for row in rank]
    return tuple(sorted(rows, key=lambda row: (not row, -float(items.loads[list(row)].sum()), row)))
