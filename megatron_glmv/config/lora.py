"""Low-rank adapters: which linear layers get one, and their size.

Source: arXiv 2106.09685, section 4.1; the names and the scale alpha / rank are those of peft 0.21.2, tuners/lora/config.py.
"""

from __future__ import annotations

from pydantic import Field

from megatron_glmv.config.base import Config


class LoraConfig(Config):
    """Adapters on frozen weights: y = W x + alpha / rank * B A x, where only A and B learn. Nothing of this is in the paper."""

    rank: int = Field(default=16, ge=1)
    """Rows of A and columns of B, the same in every adapter."""
    alpha: float = Field(default=32.0, gt=0)
    """An adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that are dropped in training; adapters of one fused product (q, k, v) drop the same ones."""
    targets: tuple[str, ...] = Field(min_length=1)
    """Patterns of Hugging Face module names; a linear layer gets an adapter if a pattern matches its name or what follows any
    dot of it: q_proj, attn.qkv, language_model.*.mlp.down_proj, visual.*, lm_head. In a pattern * matches dots too."""
