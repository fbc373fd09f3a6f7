"""What a training step computes and exchanges, recorded as torch dispatches it: matrix products and collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention_for_cpu_backward")  # fmt: skip
"""Operators of aten whose work is matrix products."""
BARRIERS = ("barrier", "monitored_barrier_")


class TensorForm(NamedTuple):
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        """A fresh tensor of this form, of small random values where it holds floats."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        return made.normal_(std=0.1) if self.dtype.is_floating_point else made.zero_()


class Call(NamedTuple):
    """One call of an operator; tensors are replaced by their forms."""

    operator: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Exchange(NamedTuple):
    """One collective or message: its operator, and the bytes of its largest argument."""

    name: str
    num_bytes: int


class Recorder(TorchDispatchMode):
    """Records the products and exchanges of what runs under it on this thread, backward passes on the CPU included."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Call] = []
        self.exchanges: list[Exchange] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, name = func.namespace, func.overloadpacket.__name__
        if space == "aten" and name in PRODUCTS:
            self.products.append(Call(func, *tree_map(_form, (tuple(args), kwargs))))
        elif space == "c10d" and name not in BARRIERS and _num_ranks(args) > 1:
            self.exchanges.append(Exchange(name, max(_num_bytes(argument) for argument in args)))
        return func(*args, **kwargs)


def _form(value: Any) -> Any:
    return TensorForm(tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


def _num_ranks(args: Any) -> int:
    """Of the group among a collective's arguments."""
    return next(dist.ProcessGroup.unbox(value).size() for value in args if isinstance(value, torch.ScriptObject))


def _num_bytes(argument: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_flatten(argument)[0] if isinstance(leaf, Tensor))


def volume(exchanges: Sequence[Exchange]) -> tuple[int, int]:
    """Number of exchanges and their bytes."""
    return len(exchanges), sum(exchange.num_bytes for exchange in exchanges)


def prepare(products: Iterable[Call]) -> list[Callable[[], Any]]:
    """The same products on fresh tensors, in the same order; equal forms at equal places share a tensor."""
    made: dict[tuple[int, TensorForm], Tensor] = {}

    def fresh(place: int, value: Any) -> Any:
        if not isinstance(value, TensorForm):
            return value
        if (place, value) not in made:
            made[place, value] = value.make()
        return made[place, value]

    prepared: list[Callable[[], Any]] = []
    for operator, args, kwargs in products:
        own = tuple(fresh(place, value) for place, value in enumerate(args))
        prepared.append(partial(operator, *own, **kwargs))
    return prepared
