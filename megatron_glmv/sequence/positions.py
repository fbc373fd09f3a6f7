"""Three-axis positions (time, row, column) of a document's tokens.

Source: transformers 5.23.0, models/glm4v/modeling_glm4v.py, `Glm4vModel.get_rope_index`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def multimodal_positions(
    is_visual: npt.NDArray[np.bool_], frames: Sequence[tuple[int, int]], merge: int = 2
) -> npt.NDArray[np.int64]:
    """Positions of one document.

    Text advances all axes by one a token. A frame (an image, or one temporal patch of a video) holds the time axis, counts
    rows and columns of its merged grid, and then advances all axes by its longer side.

    Args:
        is_visual: [n] where merged visual tokens stand; every run of them is one frame.
        frames: (rows, columns) of each frame in unmerged patches, in the order of the runs.
        merge: patches a side that one token merges.

    Returns:
        [3, n] int64.

    Raises:
        ValueError: the runs of visual tokens and the frames do not match.
    """
    positions = np.empty((3, len(is_visual)), dtype=np.int64)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], is_visual, [False])).astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    if len(starts) != len(frames):
        raise ValueError(f"{len(starts)} runs of visual tokens but {len(frames)} frames")
    cursor, done = 0, 0
    for start, end, (rows, columns) in zip(starts, ends, frames, strict=True):
        height, width = rows // merge, columns // merge
        if end - start != height * width:
            raise ValueError(f"a run of {end - start} visual tokens for a frame of {height} x {width} merged tokens")
        positions[:, done:start] = cursor + np.arange(start - done)
        cursor += int(start - done)
        positions[0, start:end] = cursor
        positions[1, start:end] = cursor + np.repeat(np.arange(height), width)
        positions[2, start:end] = cursor + np.tile(np.arange(width), height)
        cursor += max(height, width)
        done = int(end)
    positions[:, done:] = cursor + np.arange(len(is_visual) - done)
    return positions
