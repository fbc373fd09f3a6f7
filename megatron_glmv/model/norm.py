"""Norms whose parameters know that sequence parallelism leaves each rank a part of the tokens.

Source: transformers 5.23.0, models/glm4v/modeling_glm4v.py, `Glm4vRMSNorm` (mean square in fp32, weight after the cast).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_glmv.parallel import platform


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last axis, rounded as Hugging Face rounds it."""
    if x.dtype is torch.float32:
        return F.rms_norm(x, weight.shape, weight, epsilon)
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
