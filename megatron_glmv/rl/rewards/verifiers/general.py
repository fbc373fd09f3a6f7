"""Answers that no rule can check: the reward model scores them, or, without one, the judge.

Source: arXiv 2507.01006, section 5.2 (a model scores the answer part; box tokens in it get the lowest reward, which the format
gate sees to, since this domain wants no box).
"""

from __future__ import annotations

from typing import ClassVar

from megatron_glmv.config.rewards import GeneralConfig
from megatron_glmv.rl.rewards.verifiers.base import NO_JUDGE, WRONG, Question, Verifier
from megatron_glmv.rl.types import Reward, Task


class GeneralVerifier(Verifier[GeneralConfig]):
    """Open questions, writing, instructions."""

    prompt: ClassVar[str] = "general"
    exact: ClassVar[bool] = False

    def compare(self, task: Task, answer: str) -> Reward | Question:
        """Ask for a score; a reference, if there is one, is shown to the judge as an example of a good answer."""
        if not answer.strip():
            return WRONG
        reference = task.answer if isinstance(task.answer, str) else ""
        return Question(
            prompt=str(self.settings.prompt or self.prompt),
            graded=True,
            question=task.question,
            reference=reference,
            answer=answer,
            without=NO_JUDGE,
            correct_from=self.settings.correct_from,
            scored=True,
            media=task.media,
        )
