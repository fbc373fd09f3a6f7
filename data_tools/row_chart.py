"""One drawing a row: what stands where (text, trained text, pictures, padding) and the three position axes above it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt

from data_tools.lint import visual_runs
from megatron_glmv.data.shard_reader import StoredRow
from megatron_glmv.sequence.positions import multimodal_positions

WIDTH, HEIGHT, BAND = 1000, 120, 14
"""Units of the drawing: its width, the height of the axes, the height of the band below."""
AXES = (("w", "column"), ("h", "row"), ("t", "time"))
"""Class and name of each axis, in the order of drawing."""

Ints = npt.NDArray[np.int64]


def draw_row(row: StoredRow, length: int, align: int, image_token: int, merge: int) -> str:
    """An inline SVG of a row; where positions cannot be computed they are left out.

    Args:
        row: to draw.
        length: tokens of a row.
        align: documents count rounded up to multiples of this.
        image_token: id of a visual token.
        merge: patches a side of one token.
    """
    scale = WIDTH / length
    positions: list[Ints] = []
    parts: list[str] = []
    start = 0
    for document in row.documents:
        size = len(document.tokens)
        try:
            own = multimodal_positions(document.tokens == image_token, document.frames, merge)
        except ValueError:
            own = np.zeros((3, size), dtype=np.int64)
        positions.append(own)
        parts.append(_band("text", start, start + size, scale))
        trained = np.concatenate(([0], (document.loss_weights > 0).astype(np.int8), [0]))
        edges = np.flatnonzero(np.diff(trained)).tolist()
        parts += [_band("trained", start + a, start + b, scale) for a, b in _joined(edges, scale)]
        runs = [edge for run in visual_runs(document, image_token) for edge in run]
        parts += [_band("visual", start + a, start + b, scale) for a, b in _joined(runs, scale)]
        padded = -(-size // align) * align
        positions.append(np.zeros((3, padded - size), dtype=np.int64))
        start += padded
        x = start * scale
        parts.append(f'<path class="edge" d="M{x:.1f} 0V{HEIGHT + BAND}"><title>{escape(document.key)} ends</title></path>')
    joined = np.concatenate(positions, axis=1) if positions else np.zeros((3, 0), dtype=np.int64)
    top = max(1, int(joined.max(initial=0)))
    lines = [
        f'<path class="axis {name}" d="{_line(joined[axis], scale, top)}"/>'
        for axis, (name, _) in zip((2, 1, 0), AXES, strict=True)
    ]
    label = f'<text x="4" y="11">{top}</text>'
    return (f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT + BAND + 4}" preserveAspectRatio="none" role="img" '
            f'aria-label="positions of the row">{"".join(parts)}{"".join(lines)}{label}</svg>')  # fmt: skip


def _band(kind: str, start: int, end: int, scale: float) -> str:
    width = max(0.3, (end - start) * scale)
    return f'<rect class="{kind}" x="{start * scale:.1f}" y="{HEIGHT + 4}" width="{width:.1f}" height="{BAND}"/>'


def _joined(edges: Sequence[int], scale: float) -> list[tuple[int, int]]:
    """Runs, those joined that are less than half a unit apart: a row of 32,768 tokens may hold thousands."""
    runs: list[tuple[int, int]] = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if runs and (start - runs[-1][1]) * scale < 0.5:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return runs


def _line(values: Ints, scale: float, top: int) -> str:
    """A path through the smallest and largest value of every unit, so that the teeth of a grid stay visible as a band."""
    if not len(values):
        return ""
    step = max(1, round(1 / scale))
    heights = HEIGHT - values / top * (HEIGHT - 4)
    pieces = []
    for start in range(0, len(values), step):
        part = heights[start : start + step]
        x, low, high = start * scale, part.min(), part.max()
        pieces.append(f"{x:.1f} {high:.0f}" + (f"L{x:.1f} {low:.0f}" if high - low >= 1 else ""))
    return "M" + "L".join(pieces)
