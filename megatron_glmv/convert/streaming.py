"""Runs a model whose weights are in memory only while they are used: one layer at a time, in float32.

The model is built without memory for its parameters. Each unit (a layer, the merger) is filled before its forward and emptied
after it; what is small stays; of the embedding and the output layer only rows are read. So two models of any size can be
compared on a machine that could not hold one of them.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK_ROWS = 8_192
"""Rows of the embedding or the output layer that are in memory at once."""

ReadTensor = Callable[[str], Tensor]
"""Parameter's name in the model -> its values in any dtype."""
ReadRows = Callable[[int, int], Tensor]
"""(first row, last row) -> those rows."""


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device; buffers are real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, None if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextlib.contextmanager
def streamed(model: nn.Module, units: Sequence[str], read: ReadTensor, done: Callable[[str], object]) -> Iterator[None]:
    """Have a model built by `without_memory` read its weights when they are used; afterwards nothing of them is left.

    Args:
        model: without its large embedding and output layer; see `RowEmbedding` and `RowHead`.
        units: names of the modules that are filled for their forward alone; everything else is filled now.
        read: where the weights come from.
        done: is told each unit's name when it has run.
    """
    in_units = tuple(f"{unit}." for unit in units)
    buffers: dict[tuple[str, torch.Size], Tensor] = {}
    outside = [(name, module) for name, module in model.named_modules() if not f"{name}.".startswith(in_units)]
    for name, module in outside:
        for own in _own(module):
            _fill(module, own, read(f"{name}.{own}" if name else own), {})
    for unit in units:
        _stream_unit(model.get_submodule(unit), unit, read, done, buffers)
    try:
        yield
    finally:
        buffers.clear()
        for _, module in outside:
            for own in _own(module):
                _empty(module, own)


def _stream_unit(
    unit: nn.Module, name: str, read: ReadTensor, done: Callable[[str], object], buffers: dict[tuple[str, torch.Size], Tensor]
) -> None:
    owners = [(module, own, f"{path}.{own}" if path else own) for path, module in unit.named_modules() for own in _own(module)]

    def fill(*unused: Any) -> None:
        if buffers.keys() - {(key, getattr(module, own).shape) for module, own, key in owners}:
            buffers.clear()  # another kind of unit
        for module, own, key in owners:
            _fill(module, own, read(f"{name}.{key}"), buffers, key)

    def empty(*unused: Any) -> None:
        for module, own, _ in owners:
            _empty(module, own)
        _return_freed_memory()
        done(name)

    unit.register_forward_pre_hook(fill)
    unit.register_forward_hook(empty)


def _return_freed_memory() -> None:
    """Give what was freed back to the system, which glibc otherwise keeps: some of the largest temporary tensors' size."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _empty(module: nn.Module, own: str) -> None:
    module._parameters[own] = nn.Parameter(getattr(module, own).to("meta"), requires_grad=False)


def _own(module: nn.Module) -> list[str]:
    """Names of a module's own parameters, without those of its children."""
    return [name for name, _ in module.named_parameters(recurse=False)]


def _fill(module: nn.Module, own: str, values: Tensor, buffers: dict[tuple[str, torch.Size], Tensor], key: str = "") -> None:
    """Give a parameter its values; layers of one kind use the same memory one after the other."""
    wanted = getattr(module, own).shape
    if values.shape != wanted:
        raise ValueError(f"{own}: {list(values.shape)} where the module has {list(wanted)}")
    target = buffers.setdefault((key, values.shape), torch.empty(values.shape)) if key else torch.empty(values.shape)
    module._parameters[own] = nn.Parameter(target.copy_(values), requires_grad=False)


class RowEmbedding(nn.Module):
    """An embedding that reads `BLOCK_ROWS` rows of its table at a time, and keeps nothing.

    Args:
        read: where the rows come from.
        num_rows: of the whole table.
    """

    def __init__(self, read: ReadRows, num_rows: int) -> None:
        super().__init__()
        self._read, self._num_rows = read, num_rows

    def forward(self, ids: Tensor) -> Tensor:
        """[...] int64 -> [..., hidden] float32."""
        found: Tensor | None = None
        for start, stop in _blocks(self._num_rows):
            rows = self._read(start, stop)
            wanted = (ids >= start) & (ids < stop)
            if found is None:
                found = torch.empty(*ids.shape, rows.shape[1])
            found[wanted] = rows[ids[wanted] - start].float()
        assert found is not None
        return found


class RowHead(nn.Module):
    """An output layer that reads `BLOCK_ROWS` rows of its matrix at a time.

    Args:
        read: where the rows come from.
        num_rows: of the whole matrix.
        with_bias: return (logits, None), as Megatron's linear layers do.
    """

    def __init__(self, read: ReadRows, num_rows: int, *, with_bias: bool) -> None:
        super().__init__()
        self._read, self._num_rows, self._with_bias = read, num_rows, with_bias

    def forward(self, hidden: Tensor) -> Tensor | tuple[Tensor, None]:
        """[..., hidden] -> [..., num_rows] float32."""
        logits = torch.empty(*hidden.shape[:-1], self._num_rows)
        for start, stop in _blocks(self._num_rows):
            logits[..., start:stop] = F.linear(hidden, self._read(start, stop).float())
        return (logits, None) if self._with_bias else logits


def _blocks(num_rows: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_rows, BLOCK_ROWS):
        yield start, min(start + BLOCK_ROWS, num_rows)
