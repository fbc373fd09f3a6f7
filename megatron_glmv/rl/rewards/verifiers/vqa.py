"""Short answers about one picture: equal text, the right option, an equal number, or the judge."""

from __future__ import annotations

from megatron_glmv.config.rewards import VqaConfig
from megatron_glmv.rl.rewards.verifiers.short_answer import ShortAnswerVerifier


class VqaVerifier(ShortAnswerVerifier[VqaConfig]):
    """Short answers about one picture."""
