"""Boxes, points and spans: reading them, intersection over union, and the best matching of many to many.

Source: per-mille coordinates inside the box tokens: zai-org/GLM-V issues 112 and 114.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
Span = tuple[float, float]

_NUMBER = r"\s{0,4}([+-]?\d{1,6}(?:\.\d{0,8})?)\s{0,4}"
_BOX = re.compile(rf"[\[(]{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}[\])]")
_POINT = re.compile(rf"[\[(]{_NUMBER},{_NUMBER}[\])]")
_BETWEEN = re.compile(r"[\s,;\[\]]*")


def read_boxes(text: str) -> list[Box] | None:
    """All boxes of a text that holds nothing else, [1, 2, 3, 4] or [[1, 2, 3, 4], [5, 6, 7, 8]]; else None."""
    boxes = [_floats(found) for found in _BOX.findall(text)]
    return boxes if _BETWEEN.fullmatch(_BOX.sub(" ", text)) else None  # type: ignore[return-value]


def read_point(text: str) -> tuple[float, float] | None:
    """The point of a text that holds nothing else: [1, 2] or (1, 2)."""
    found = _POINT.fullmatch(text.strip())
    return _floats(found.groups()) if found else None  # type: ignore[return-value]


def _floats(parts: Sequence[str]) -> tuple[float, ...]:
    return tuple(float(part) for part in parts)


def numbers(value: Any, length: int) -> tuple[float, ...] | None:
    """A list of `length` numbers as floats; None for everything else."""
    if not isinstance(value, list | tuple) or len(value) != length:
        return None
    if not all(isinstance(part, int | float) and not isinstance(part, bool) and abs(part) < 1e9 for part in value):
        return None
    return tuple(float(part) for part in value)


def is_box(box: Box, scale: float) -> bool:
    """Whether a box lies within the picture and has an area."""
    left, top, right, bottom = box
    return 0 <= left < right <= scale and 0 <= top < bottom <= scale


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes with areas."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def span_iou(a: Sequence[Span], b: Sequence[Span]) -> float:
    """Length of the intersection of two sets of spans over that of their union."""
    a, b = merge_spans(a), merge_spans(b)
    shared = sum(max(0.0, min(x[1], y[1]) - max(x[0], y[0])) for x in a for y in b)
    total = sum(end - start for start, end in (*a, *b)) - shared
    return shared / total if total > 0 else 0.0


def merge_spans(spans: Sequence[Span]) -> list[Span]:
    """The same times as spans that do not overlap, in order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def best_matching(weights: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Pairs of rows and columns, each used once, with the largest sum of weights (Hungarian method, O(n^3)).

    Args:
        weights: rows of equal length.

    Returns:
        min(rows, columns) pairs (row, column).
    """
    if not weights or not weights[0]:
        return []
    if len(weights) > len(weights[0]):
        return [(row, column) for column, row in best_matching(list(zip(*weights, strict=True)))]
    num_rows, num_columns = len(weights), len(weights[0])
    of_row, of_column = [0.0] * (num_rows + 1), [0.0] * (num_columns + 1)
    row_of = [0] * (num_columns + 1)  # 1-based; column 0 holds the row that is being placed
    for row in range(1, num_rows + 1):
        _place(row, weights, of_row, of_column, row_of)
    return sorted((row_of[column] - 1, column - 1) for column in range(1, num_columns + 1) if row_of[column])


def _place(
    row: int, weights: Sequence[Sequence[float]], of_row: list[float], of_column: list[float], row_of: list[int]
) -> None:
    """Give `row` a column along the cheapest chain of changes; potentials and matching are changed in place."""
    num_columns = len(row_of) - 1
    least, came_from = [float("inf")] * (num_columns + 1), [0] * (num_columns + 1)
    used = [False] * (num_columns + 1)
    row_of[0], column = row, 0
    while row_of[column]:
        used[column] = True
        current, delta, following = row_of[column], float("inf"), 0
        for other in range(1, num_columns + 1):
            if used[other]:
                continue
            cost = -weights[current - 1][other - 1] - of_row[current] - of_column[other]
            if cost < least[other]:
                least[other], came_from[other] = cost, column
            if least[other] < delta:
                delta, following = least[other], other
        for other in range(num_columns + 1):
            if used[other]:
                of_row[row_of[other]] += delta
                of_column[other] -= delta
            else:
                least[other] -= delta
        column = following
    while column:
        before = came_from[column]
        row_of[column] = row_of[before]
        column = before
