"""Norms whose parameters know that sequence parallelism leaves each rank a part of the tokens.

Source: transformers 5.23.0, models/glm4v/modeling_glm4v.py, `Glm4vRMSNorm` (mean square in fp32, weight after the cast).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_glmv.parallel import platform


class _RmsNorm(torch.autograd.Function):
    """The norm in float32, with a backward pass of a third of the passes over memory that autograd makes of its operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """[..., h] float32 x, normed over the last axis and scaled by [h] weight."""
        inverse = torch.rsqrt(torch.linalg.vecdot(x, x).unsqueeze(-1).div_(x.shape[-1]).add_(epsilon))
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """From the gradient of the result, [..., h], those of x, [..., h], and of the weight, [h]."""
        normed, inverse, weight = ctx.saved_tensors
        along = grads[0] * normed
        mean = (along @ weight).unsqueeze(-1).div_(weight.numel())
        slope = (grads[0] * weight).addcmul_(normed, mean, value=-1).mul_(inverse)
        return slope, along.flatten(0, -2).sum(0), None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last axis, rounded as Hugging Face rounds it."""
    if x.dtype is torch.float32:
        return _RmsNorm.apply(x, weight, epsilon)
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def norm_weight(size: int, config: TransformerConfig, value: float = 1.0) -> nn.Parameter:
    """A norm's parameter: its gradient is summed over tensor ranks when each sees a part of the tokens."""
    weight = nn.Parameter(torch.full((size,), value, dtype=config.params_dtype, device=platform.device()))
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight


class RMSNorm(nn.Module):
    """Megatron's norm interface around `rms_norm`; the ``torch`` layer spec's norm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = norm_weight(hidden_size, config)
        self.epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm over the last axis; same shape and dtype."""
        return rms_norm(x, self.weight, self.epsilon)


class LayerNorm(nn.Module):
    """The merger's norm, with bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = norm_weight(hidden_size, config)
        self.bias = norm_weight(hidden_size, config, 0.0)
        self.epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm over the last axis; same shape and dtype."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)
