"""Values read from a chart: relative tolerance, years exact, texts equal or judged.

Source: arXiv 2507.01006, section 5.2; numbers of zai-org/GLM-V 8fc9756, where this verifier gave 0 to every answer because its
extraction refused the answer tags that the format gate demanded.
"""

from __future__ import annotations

import re
from typing import ClassVar

from megatron_glmv.config.rewards import ChartConfig
from megatron_glmv.rl.rewards.forms import Rule
from megatron_glmv.rl.rewards.verifiers.base import Question
from megatron_glmv.rl.rewards.verifiers.math import NumericVerifier
from megatron_glmv.rl.types import Reward, Task

_CURRENCY = re.compile(r"\\?[$€£¥]|\b(?:USD|EUR|GBP|RMB|CNY)\b")
_MAGNITUDE = re.compile(r"(?<=\d)\s*(thousand|million|billion|trillion|mn|bn|[kKMB])(?![A-Za-z])")
_POWERS = {"thousand": 3, "k": 3, "million": 6, "mn": 6, "m": 6, "billion": 9, "bn": 9, "b": 9, "trillion": 12}


class ChartVerifier(NumericVerifier[ChartConfig]):
    """Values read from a chart."""

    prompt: ClassVar[str] = "chart"
    formulas: ClassVar[bool] = False

    @property
    def rule(self) -> Rule:
        """Whole numbers within the tolerance too, but years exactly."""
        first, last = self.settings.years
        tolerance = self.settings.tolerance

        def wholes(answer: int, reference: int) -> bool:
            years = first <= answer <= last and first <= reference <= last
            return answer == reference if years else abs(answer - reference) <= tolerance * abs(reference)

        return Rule(tolerance, wholes)

    def compare(self, task: Task, answer: str) -> Reward | Question:
        """As in mathematics, with currencies left out and millions written out."""
        if isinstance(task.answer, str):
            task = Task(task.key, task.domain, task.question, _spelled(task.answer), task.subcategory, task.options, task.media)
        return self.by_formula(task, _spelled(answer))


def _spelled(text: str) -> str:
    text = _CURRENCY.sub(" ", text)
    return _MAGNITUDE.sub(lambda found: f" * 10^{_POWERS[found[1].lower()]}", text).strip()
