"""Entropy of the next token's distribution where the vocabulary is divided among tensor ranks.

With H = log Z - sum p z, the derivative of H by a logit is -p (log p + H): every rank knows its own part of it, so the backward
pass needs no communication.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabParallelEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
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
        entropy = total.log() - weighted / total
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(chances.div_(total[..., None]), entropy)
            ctx.dtype = logits.dtype
        return entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        chances, entropy = ctx.saved_tensors
        slope = torch.xlogy(chances, chances) + chances * entropy[..., None]
        return (-grads[0][..., None] * slope).to(ctx.dtype), None


def vocab_parallel_entropy(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Entropy in nats.

    Args:
        logits: [..., V / tensor ranks], left as they are.
        group: of the tensor ranks.

    Returns:
        [...] float32, the same on every tensor rank.
    """
    return _VocabParallelEntropy.apply(logits, group)
