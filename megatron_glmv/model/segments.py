"""Segments of a row that attend only within themselves: documents in the decoder, frames in the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_glmv.sequence.shard import row_order


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
    """Megatron's packed-sequence parameters, and the same cut prepared for batched attention without Transformer Engine.

    Attributes:
        groups: segments gathered by length, so that each length is one batched call.
        order: [S] int64, undoes the concatenation of the groups' queries.
        context: ranks that share the row.
        rank: this rank among them.
    """

    groups: list[Group] = field(default_factory=list)
    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
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
    groups, taken = [], []
    for length, members in by_length.items():
        queries = torch.tensor([local_starts[i] for i in members])[:, None] + torch.arange(length // context)
        keys = keys_of_row[torch.tensor([starts[i] for i in members])[:, None] + torch.arange(length)]
        groups.append(Group(length, queries.to(device), keys.to(device)))
        taken.append(queries.flatten())
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
        groups=groups,
        order=torch.argsort(torch.cat(taken)).to(device),
        context=context,
        rank=rank,
    )
