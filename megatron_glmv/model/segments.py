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
class Group:
    """Segments of one length: their tokens among this rank's (queries) and among the gathered ones (keys).

    Attributes:
        length: tokens of each segment in the whole row.
        queries: [segments, length / context] int64.
        keys: [segments, length] int64, in the order of the row.
    """

    length: int
    queries: Tensor
    keys: Tensor


@dataclass
class Segments(PackedSeqParams):
    """Megatron's packed-sequence parameters, and the same cut for batched attention without Transformer Engine.

    Attributes:
        lengths: tokens of each segment in the whole row.
        context: ranks that share the row.
        rank: this rank among them.
    """

    lengths: tuple[int, ...] = ()
    context: int = 1
    rank: int = 0

    @cached_property
    def _grouped(self) -> tuple[list[Group], Tensor]:
        """Made when the first layer asks, which those of Transformer Engine never do."""
        return _group(self.lengths, self.cu_seqlens_q.device, self.context, self.rank)

    @property
    def groups(self) -> list[Group]:
        """Segments gathered by length, so that each length is one batched call."""
        return self._grouped[0]

    @property
    def order(self) -> Tensor:
        """[S] int64, undoes the concatenation of the groups' queries."""
        return self._grouped[1]


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


def _group(lengths: Sequence[int], device: torch.device, context: int, rank: int) -> tuple[list[Group], Tensor]:
    """Segments by length, and the order that undoes the grouping."""
    starts = list(accumulate(lengths, initial=0))
    local_starts = [start // context for start in starts]
    keys_of_row = row_order(lengths, context) if context > 1 else torch.arange(starts[-1])
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    groups, taken = [], []
    for length, members in by_length.items():
        queries = torch.tensor([local_starts[i] for i in members])[:, None] + torch.arange(length // context)
        keys = keys_of_row[torch.tensor([starts[i] for i in members])[:, None] + torch.arange(length)]
        groups.append(Group(length, to_device(queries, device), to_device(keys, device)))
        taken.append(queries.flatten())
    return groups, to_device(torch.argsort(torch.cat(taken)), device)
