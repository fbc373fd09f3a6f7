"""Where a picture was taken: equal text, else graded by the judge.

Source: arXiv 2507.01006, section 5.2. zai-org/GLM-V 8fc9756 gave 0 to every answer: its prompt lacked the placeholders that its
code insisted on. Here every prompt is checked for its placeholders before the first answer.
"""

from __future__ import annotations

from typing import ClassVar

from megatron_glmv.config.rewards import GeoConfig
from megatron_glmv.rl.rewards.verifiers.base import NO_JUDGE, WRONG, Question, Verifier
from megatron_glmv.rl.types import Reward, Task


class GeoVerifier(Verifier[GeoConfig]):
    """Places in the world."""

    prompt: ClassVar[str] = "geo"

    def compare(self, task: Task, answer: str) -> Reward | Question:
        """Ask the judge for a grade."""
        return self.ask(task, answer, NO_JUDGE, graded=True) if answer.strip() else WRONG
