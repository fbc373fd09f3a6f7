"""Answers from long documents: equal text, else the judge, who looks at the meaning.

Source: arXiv 2507.01006, section 5.2. zai-org/GLM-V 8fc9756 has settings for it and no verifier.
"""

from __future__ import annotations

from typing import ClassVar

from megatron_glmv.config.rewards import LongDocumentConfig
from megatron_glmv.rl.rewards.verifiers.base import NO_JUDGE, WRONG, Question, Verifier
from megatron_glmv.rl.types import Reward, Task


class LongDocumentVerifier(Verifier[LongDocumentConfig]):
    """Answers from long documents."""

    prompt: ClassVar[str] = "long_document"

    def compare(self, task: Task, answer: str) -> Reward | Question:
        """Ask the judge."""
        return self.ask(task, answer, NO_JUDGE) if answer.strip() else WRONG
