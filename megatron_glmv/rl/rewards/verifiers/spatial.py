"""Short answers about places, sizes and directions: equal text, the right option, an equal number, or the judge."""

from __future__ import annotations

from megatron_glmv.config.rewards import SpatialConfig
from megatron_glmv.rl.rewards.verifiers.short_answer import ShortAnswerVerifier


class SpatialVerifier(ShortAnswerVerifier[SpatialConfig]):
    """Short answers about places, sizes and directions."""
