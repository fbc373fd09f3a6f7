"""Segments of a row that attend only within themselves: documents in the decoder, frames in the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_glmv.sequence.shard import row_order


@dataclass(frozen=True)
class Order:
    """A permutation of tokens and its inverse, both [tokens] int64."""

    there: Tensor
    back: Tensor


NOWHERE = Order(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


@dataclass
class Segments(PackedSeqParams):
    """Megatron's packed-sequence parameters, and the same cut prepared for batched attention without Transformer Engine.

    Attributes:
        groups: (segments, tokens of each in the whole row) of every length, so that each length is one batched call.
        queries: brings this rank's tokens into the order of the groups.
        keys: brings the tokens of all ranks into the order of the groups, each segment in the order of the row.
        context: ranks that share the row.
        rank: this rank among them.
    """

    groups: tuple[tuple[int, int], ...] = ()
    queries: Order = NOWHERE
    keys: Order = NOWHERE
    context: int = 1
    rank: int = 0


def make_segments(lengths: Sequence[int], device: torch.device, context: int = 1, rank: int = 0) -> Segments:
    """Prepare the segments of one row.

    Args:
        lengths: tokens of each segment, in order; with context > 1 each a multiple of 2 x context.
        device: where attention runs.
        context: ranks that share the row.
        rank: this rank among them.
    """
    local_starts = [start // context for start in accumulate(lengths, initial=0)]
    starts = list(accumulate(lengths, initial=0))
    keys_of_row = row_order(lengths, context) if context > 1 else torch.arange(starts[-1])
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    members = [index for group in by_length.values() for index in group]
    sizes = torch.tensor([lengths[i] for i in members])
    queries = _runs(torch.tensor([local_starts[i] for i in members]), sizes // context)
    keys = keys_of_row[_runs(torch.tensor([starts[i] for i in members]), sizes)]
    boundaries = torch.tensor(starts, dtype=torch.int32, device=device)
    longest = max(lengths)
    return Segments(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        cu_seqlens_q_padded=boundaries,
        cu_seqlens_kv_padded=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        groups=tuple((len(group), length) for length, group in by_length.items()),
        queries=_order(queries, device),
        keys=_order(keys, device),
        context=context,
        rank=rank,
    )


def _order(there: Tensor, device: torch.device) -> Order:
    back = torch.empty_like(there)
    back[there] = torch.arange(len(there))
    return Order(there.to(device), back.to(device))


def _runs(starts: Tensor, lengths: Tensor) -> Tensor:
    """Every place of runs of consecutive places, one run after the other."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - before, lengths)
