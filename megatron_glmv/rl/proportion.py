"""A whole number divided in given proportions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise


def apportion(total: int, weights: Sequence[float], offset: float = 0.5) -> list[int]:
    """Divide `total` so that every part differs from its exact share by less than one.

    The shares are laid end to end on a line, and a part gets the points k + 1 - offset that fall into its share. With a random
    offset the expected parts are the exact shares, so that small shares get their due over many draws.

    Args:
        total: 0 or more.
        weights: not negative, at least one above 0.
        offset: 0 or more, below 1.

    Returns:
        Parts that sum to `total`; a weight of 0 gets nothing.

    Raises:
        ValueError: weights without a positive sum, or an offset outside its range.
    """
    edges = [0.0, *accumulate(weights)]
    if not 0 < edges[-1] < math.inf or min(weights) < 0 or not 0 <= offset < 1:
        raise ValueError(f"cannot divide {total} by weights {list(weights)} with offset {offset}")
    marks = [math.floor(total * (edge / edges[-1]) + offset) for edge in edges]
    return [end - start for start, end in pairwise(marks)]
