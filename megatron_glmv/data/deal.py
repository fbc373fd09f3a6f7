"""Which replica takes which rows of a step: equally many each, and costs that are as even as the rows allow.

A step ends with the slowest replica. The rows of a global batch are fixed by its order; dealing only decides who trains on
which, so a run with another number of replicas trains on the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

EVEN_ENOUGH = 0.002
"""Exchanges end when no replica costs more than this share above the mean."""
MAX_EXCHANGES = 64


def deal_rows(costs: Sequence[float] | npt.NDArray[np.float64], num_ranks: int) -> list[list[int]]:
    """Deal rows to replicas: the costliest first, each to the cheapest replica with a place; then by exchanges.

    Args:
        costs: [n] of each row, any unit; n a multiple of num_ranks.
        num_ranks: replicas.

    Returns:
        For each replica the indexes of its rows, rising.
    """
    values = np.asarray(costs, dtype=np.float64)
    share = len(values) // num_ranks
    deal: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = np.zeros(num_ranks)
    for row in np.argsort(-values, kind="stable").tolist():
        rank = int(loads.argmin())
        deal[rank].append(row)
        loads[rank] += values[row]
        if len(deal[rank]) == share:
            loads[rank] += np.inf
    if num_ranks > 1 and share > 1:
        _exchange(values, deal)
    return [sorted(rows) for rows in deal]


def _exchange(costs: npt.NDArray[np.float64], deal: list[list[int]]) -> None:
    """Swap single rows between the costliest replica and the cheapest that helps, in place, while the costliest gains."""
    loads = np.array([costs[rows].sum() for rows in deal])
    mean = loads.mean()
    for _ in range(MAX_EXCHANGES):
        heavy = int(loads.argmax())
        if loads[heavy] <= mean * (1 + EVEN_ENOUGH):
            return
        for light in np.argsort(loads, kind="stable")[:8].tolist():
            gap = loads[heavy] - loads[light]
            moved = costs[deal[heavy]][:, None] - costs[deal[light]][None, :]
            helps = (moved > 1e-9 * gap) & (moved < (1 - 1e-9) * gap)
            if not helps.any():
                continue
            one, two = divmod(int(np.where(helps, np.abs(moved - gap / 2), np.inf).argmin()), len(deal[light]))
            deal[heavy][one], deal[light][two] = deal[light][two], deal[heavy][one]
            loads[heavy] -= moved[one, two]
            loads[light] += moved[one, two]
            break
        else:
            return
