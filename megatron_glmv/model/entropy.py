"""Entropy of the next token's distribution where the vocabulary is divided among tensor ranks.

With H = log Z - sum p z, the derivative of H by a logit is -p (log p + H): every rank knows its own part of it, so the backward
pass needs no communication.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_glmv.config.rl import ENTROPY_BLOCK


class _VocabParallelEntropy(torch.autograd.Function):
    """The entropy with its gradient, for which the distribution of every token is kept: [S, 1, V / tensor ranks] float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        chances, total, entropy = _distribution(logits, group)
        ctx.save_for_backward(chances.div_(total[..., None]), entropy)
        ctx.dtype = logits.dtype
        return entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """By each logit of this rank: -p (log p + H)."""
        chances, entropy = ctx.saved_tensors
        slope = torch.xlogy(chances, chances) + chances * entropy[..., None]
        return (-grads[0][..., None] * slope).to(ctx.dtype), None


def vocab_parallel_entropy(logits: Tensor, group: dist.ProcessGroup, *, learn: bool) -> Tensor:
    """Entropy in nats.

    Args:
        logits: [S, 1, V / tensor ranks], left as they are.
        group: of the tensor ranks.
        learn: with a gradient, for which the distribution of every token is kept; else in blocks, without one.

    Returns:
        [S, 1] float32, the same on every tensor rank.
    """
    if learn:
        return _VocabParallelEntropy.apply(logits, group)
    with torch.no_grad():
        return torch.cat([_distribution(block, group)[2] for block in logits.split(ENTROPY_BLOCK)])


def _distribution(logits: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - top) of this rank's part of the vocabulary; their sum and the entropy over the whole of it."""
    shared = dist.get_world_size(group) > 1
    top = logits.amax(-1, keepdim=True).float()
    if shared:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    shifted = logits.float() - top
    chances = shifted.exp()
    sums = torch.stack((chances.sum(-1), (chances * shifted).sum(-1)))
    if shared:
        dist.all_reduce(sums, group=group)
    total, weighted = sums
    return chances, total, total.log() - weighted / total
