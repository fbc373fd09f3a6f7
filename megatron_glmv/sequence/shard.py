"""Which tokens of a row a rank holds, and which of them go on behind the last attention.

Context-parallel slices cost every rank the same causal attention.

Each document is cut into ``2 x context`` equal chunks; rank r takes chunks r and ``2 x context - 1 - r``, so that every rank
gets an early and a late one. An image may cross a cut: positions and features go with their tokens.

Source: Transformer Engine 2.11, pytorch/attention/dot_product_attention/context_parallel.py (THD layout).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def context_indices(document_lengths: Sequence[int], context: int, rank: int) -> Tensor:
    """Which tokens of the row rank `rank` of `context` holds, in the order in which it holds them.

    Args:
        document_lengths: lengths of the row's documents, each a multiple of ``2 x context``.

    Returns:
        [S / context] int64 indexes into the row.

    Raises:
        ValueError: a document cannot be cut evenly.
    """
    row = torch.arange(sum(document_lengths))
    if context == 1:
        return row
    pieces: list[Tensor] = []
    start = 0
    for length in document_lengths:
        if length % (2 * context):
            raise ValueError(
                f"a document of {length} tokens cannot be cut for context {context}; "
                f"pack with --align {2 * context} or a multiple of it"
            )
        chunk = length // (2 * context)
        both = (start + part * chunk for part in (rank, 2 * context - 1 - rank))
        pieces.extend(row[first : first + chunk] for first in both)
        start += length
    return torch.cat(pieces)


def row_order(document_lengths: Sequence[int], context: int) -> Tensor:
    """Where each token of the row stands after gathering all ranks' slices one after the other.

    Returns:
        [S] int64: ``gathered[row_order(...)]`` is the row.
    """
    gathered = torch.cat([context_indices(document_lengths, context, rank) for rank in range(context)])
    return torch.argsort(gathered)


def trained_indices(trained: Tensor, num_parts: int, multiple: int) -> Tensor:
    """Which tokens of each tensor rank's part go on behind the last attention: the trained ones, and equally many of each part.

    A part that has fewer is filled up with tokens that are not trained.

    Args:
        trained: [S] bool, of a context rank's tokens.
        num_parts: consecutive parts of S / num_parts tokens, one for each tensor rank under sequence parallelism; else 1.
        multiple: what each takes is a multiple of this, or all of its part.

    Returns:
        [num_parts, k] int64 indexes into the S tokens, rising.
    """
    parts = trained.view(num_parts, -1)
    most = max(1, int(parts.sum(1).max()))
    taken = min(parts.size(1), -(-most // multiple) * multiple)
    first = torch.argsort(parts.logical_not().to(torch.uint8), dim=1, stable=True)[:, :taken]
    return first.sort(dim=1).values + parts.size(1) * torch.arange(num_parts)[:, None]
