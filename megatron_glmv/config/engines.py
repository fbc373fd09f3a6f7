"""Which engine samples the answers of reinforcement learning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_glmv.config.base import Config


class EmbeddedConfig(Config):
    """transformers' model in every rank's own process; nothing to start."""

    kind: Literal["embedded"] = "embedded"
    max_answers: int = Field(default=64, ge=1)
    """Answers that decode together on a rank."""
    gap_alarm: float | None = Field(default=0.05, gt=0)
    """Warn where the engine's and the trainer's log-probabilities differ by more than this on average, in nats; null: no."""


EngineConfig = EmbeddedConfig
