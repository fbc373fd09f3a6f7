"""Segments of a row that attend only within themselves: documents in the decoder, frames in the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_glmv.sequence.shard import row_order
from megatron_glmv.sequence.transfer import to_device


@dataclass(frozen=True)
class Order:
    """A permutation of tokens and its inverse, both [tokens] int64."""

    there: Tensor
    back: Tensor


@dataclass(frozen=True)
class Grouping:
    """Segments gathered by length, so that each length is one batched call.

    Attributes:
        groups: (segments, tokens of each in the whole row) of every length.
        queries: brings this rank's tokens into the order of the groups.
        keys: brings the tokens of all ranks into the order of the groups, each segment in the order of the row.
    """

    groups: tuple[tuple[int, int], ...]
    queries: Order
    keys: Order


@dataclass
class Segments(PackedSeqParams):
    """Megatron's packed-sequence parameters, and the same cut for batched attention without Transformer Engine.

    Attributes:
        lengths: tokens of each segment in the whole row.
        context: ranks that share the row.
        rank: this rank among them.
        going_on: [k] int64, which of this tensor rank's tokens go on behind the last attention; None: all.
    """

    lengths: tuple[int, ...] = ()
    context: int = 1
    rank: int = 0
    going_on: Tensor | None = None

    @cached_property
    def grouping(self) -> Grouping:
        """Made when the first layer asks, which those of Transformer Engine never do."""
        return _group(self.lengths, self.cu_seqlens_q.device, self.context)


def make_segments(lengths: Sequence[int], device: torch.device, context: int = 1, rank: int = 0) -> Segments:
    """Prepare the segments of one row.

    Args:
        lengths: tokens of each segment, in order; with context > 1 each a multiple of 2 x context.
        device: where attention runs.
        context: ranks that share the row.
        rank: this rank among them.
    """
    boundaries = to_device(torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32), device)
    longest = max(lengths)
    # One tensor in all four places: Transformer Engine compares padded with plain boundaries, and torch sees that both are the
    # same memory without waiting for the device. The longest segment is given for the same reason.
    return Segments(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        cu_seqlens_q_padded=boundaries,
        cu_seqlens_kv_padded=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=tuple(lengths),
        context=context,
        rank=rank,
    )


def _group(lengths: Sequence[int], device: torch.device, context: int) -> Grouping:
    starts = list(accumulate(lengths, initial=0))
    local_starts = [start // context for start in starts]
    keys_of_row = row_order(lengths, context) if context > 1 else torch.arange(starts[-1])
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    members = [index for group in by_length.values() for index in group]
    sizes = torch.tensor([lengths[i] for i in members])
    queries = _runs(torch.tensor([local_starts[i] for i in members]), sizes // context)
    keys = keys_of_row[_runs(torch.tensor([starts[i] for i in members]), sizes)]
    groups = tuple((len(group), length) for length, group in by_length.items())
    return Grouping(groups, _order(queries, device), _order(keys, device))


def _order(there: Tensor, device: torch.device) -> Order:
    back = torch.empty_like(there)
    back[there] = torch.arange(len(there))
    return Order(to_device(there, device), to_device(back, device))


def _runs(starts: Tensor, lengths: Tensor) -> Tensor:
    """Every place of runs of consecutive places, one run after the other."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - before, lengths)
