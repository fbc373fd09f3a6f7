"""Positions as numbers that layers use: rotary angles of both towers and the bicubic weights of the ViT's position table.

Shapes: S tokens, N patches, f frequencies, G side of the position table.

Source: transformers 5.23.0, models/glm4v/modeling_glm4v.py (`Glm4vTextRotaryEmbedding`, `apply_multimodal_rotary_pos_emb`,
`Glm4vVisionRotaryEmbedding`, `apply_rotary_pos_emb_vision`, `Glm4vVisionEmbeddings`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, cosine, sine) -> x rotated."""


def text_angles(positions: Tensor, base: float, rotary_dim: int, section: Sequence[int]) -> Tensor:
    """Angles of the decoder's partial, three-axis rotation.

    Args:
        positions: [3, S] int64, time / row / column.
        base: rotary base (theta).
        rotary_dim: rotated channels of a head; there are f = rotary_dim / 2 frequencies.
        section: frequencies of each axis; they sum to f.

    Returns:
        [S, f] float32.
    """
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / rotary_dim
    frequencies = 1.0 / base**exponent
    return positions.to(torch.float32)[_axes(tuple(section), positions.device)].t() * frequencies


@lru_cache
def _axes(section: tuple[int, ...], device: torch.device) -> Tensor:
    """[f] int64: the axis that each frequency follows, put on the device once."""
    with torch.inference_mode(False):
        return torch.repeat_interleave(torch.arange(3), torch.tensor(section)).to(device)


def vision_angles(rows: Tensor, columns: Tensor, head_dim: int) -> Tensor:
    """Angles of the ViT's rotation by patch row and column.

    Args:
        rows: [N] int64, patch row within its frame.
        columns: [N] int64.
        head_dim: channels of a head; half of the head_dim / 2 angles follow rows, half columns.

    Returns:
        [N, head_dim / 2] float32.
    """
    half = head_dim // 2
    exponent = torch.arange(0, half, 2, device=rows.device, dtype=torch.float32) / half
    frequencies = 1.0 / 10000.0**exponent
    return torch.cat((rows[:, None].float() * frequencies, columns[:, None].float() * frequencies), dim=1)


def cos_sin_of(angles: Tensor) -> Tensor:
    """[S, f] -> [2, S, 1, f]: cosine, sine, for `rotate_pairs` and `rotate_halves`."""
    return torch.stack((angles.cos(), angles.sin())).unsqueeze(2)


def angles_of_pairs(angles: Tensor) -> Tensor:
    """[S, f] -> [S, 1, 1, 2f]: the angle of every rotated channel, for Transformer Engine's interleaved rotation."""
    return angles.repeat_interleave(2, dim=1)[:, None, None]


def angles_of_halves(angles: Tensor) -> Tensor:
    """[S, f] -> [S, 1, 1, 2f]: the same, for its rotation of channels half a head apart."""
    return torch.cat((angles, angles), dim=1)[:, None, None]


class _Rotation(torch.autograd.Function):
    """A rotation of channels, whose gradient is the rotation by the opposite angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, turn: Turn) -> Tensor:
        """[S, 1, heads, head_dim] x, turned by the angles whose cosines and sines are [S, 1, 1, f], as `turn` pairs them."""
        ctx.save_for_backward(cos, sin)
        ctx.turn = turn
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return ctx.turn(grads[0], cos, -sin), None, None, None


def rotate_pairs(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate channels (2i, 2i+1) of the first 2f channels, in x's dtype: the decoder's rotation.

    Args:
        x: [S, 1, heads, head_dim].
        cos_sin: [2, S, 1, f] float32.
    """
    cos, sin = cos_sin.to(x.dtype).unsqueeze(2)
    return _Rotation.apply(x, cos, sin, _turn_pairs)


def _turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = 2 * cos.shape[-1]
    turned = x.clone(memory_format=torch.contiguous_format)
    if x.dtype is torch.float32 and x.shape[-1] % 2 == 0:
        pairs = torch.view_as_complex(turned[..., :rotated].unflatten(-1, (-1, 2)))
        pairs.mul_(torch.complex(cos, sin))  # the same four products, in runs that fill vector registers
        return turned
    even, odd = x[..., 0:rotated:2], x[..., 1:rotated:2]
    turned[..., 0:rotated:2] = even * cos - odd * sin
    turned[..., 1:rotated:2] = odd * cos + even * sin
    return turned


def rotate_halves(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate channels (i, i + head_dim/2) in float32: the ViT's rotation. Shapes as in `rotate_pairs`."""
    cos, sin = cos_sin.unsqueeze(2)
    return _Rotation.apply(x, cos, sin, _turn_halves)


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@lru_cache(maxsize=4096)
def patch_coordinates(num_rows: int, num_columns: int, merge: int = 2) -> Tensor:
    """Row and column of each patch of one frame, in the order in which they come: merge x merge blocks, row-major.

    Returns:
        [2, num_rows x num_columns] int64.
    """
    shape = (num_rows // merge, num_columns // merge, merge, merge)
    rows = torch.arange(num_rows).view(shape[0], 1, merge, 1).expand(shape)
    columns = torch.arange(num_columns).view(1, shape[1], 1, merge).expand(shape)
    return torch.stack((rows.flatten(), columns.flatten()))


def frame_coordinates(frames: Sequence[tuple[int, int]], merge: int = 2) -> Tensor:
    """For each patch of all frames: its row, its column, its frame's rows and its frame's columns.

    Returns:
        [4, N] int64.
    """
    return torch.cat([_one_frame(rows, columns, merge) for rows, columns in frames], dim=1)


@lru_cache(maxsize=4096)
def _one_frame(rows: int, columns: int, merge: int) -> Tensor:
    size = torch.tensor([[rows], [columns]]).expand(2, rows * columns)
    return torch.cat((patch_coordinates(rows, columns, merge), size))


def bicubic_weights(coordinate: Tensor, extent: Tensor, side: int) -> Tensor:
    """Weights with which a patch samples one axis of the position table, as `grid_sample` does.

    Bicubic with A = -0.75, align_corners false, border padding. A patch at `coordinate` of `extent` samples the middle of
    its share of the table's axis.

    Args:
        coordinate: [N] int64, row (or column) within the frame.
        extent: [N] int64, rows (or columns) of the frame.
        side: G, entries of the axis.

    Returns:
        [N, G] float32.
    """
    unit = (coordinate.float() + 0.5) / extent.float() * 2 - 1
    sample = ((unit + 1) * side - 1) / 2
    first = sample.floor()
    t = sample - first
    a = -0.75
    near, far = torch.stack((t, 1 - t), dim=1), torch.stack((t + 1, 2 - t), dim=1)
    inner = ((a + 2) * near - (a + 3)) * near * near + 1
    outer = ((a * far - 5 * a) * far + 8 * a) * far - 4 * a
    weights = torch.stack((outer[:, 0], inner[:, 0], inner[:, 1], outer[:, 1]), dim=1)
    taps = (first.long()[:, None] + torch.arange(-1, 3, device=first.device)).clamp(0, side - 1)
    hits = taps[:, :, None] == torch.arange(side, device=first.device)
    return (weights[:, :, None] * hits).sum(1)


def table_weights(coordinates: Tensor, side: int) -> Tensor:
    """Weights of all entries of the G x G position table for each patch.

    Args:
        coordinates: [4, N] from `frame_coordinates`.

    Returns:
        [N, G x G] float32; a product with the table [G x G, D] samples it, with a deterministic backward.
    """
    places, extents = coordinates.chunk(2)
    along_rows, along_columns = bicubic_weights(places.flatten(), extents.flatten(), side).chunk(2)
    return (along_rows[:, :, None] * along_columns[:, None, :]).flatten(1)
