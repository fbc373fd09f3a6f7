"""Short answers about several pictures: equal text, the right option, an equal number, or the judge."""

from __future__ import annotations

from megatron_glmv.config.rewards import MultiImageConfig
from megatron_glmv.rl.rewards.verifiers.short_answer import ShortAnswerVerifier


class MultiImageVerifier(ShortAnswerVerifier[MultiImageConfig]):
    """Short answers about several pictures."""
