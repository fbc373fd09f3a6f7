"""Numbers with tolerance and formulas by value; what cannot be read is for the judge.

Source: arXiv 2507.01006, section 5.2; tolerance of zai-org/GLM-V 8fc9756, where the numeric way never ran because sympify with
strict=True raises for every string and the error was swallowed.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

from megatron_glmv.config.rewards import MathConfig, NumericConfig
from megatron_glmv.rl.rewards.evaluation import Undefined
from megatron_glmv.rl.rewards.expression import NotAnExpression
from megatron_glmv.rl.rewards.forms import Form, Rule, read, same
from megatron_glmv.rl.rewards.notation import TooLarge, plain
from megatron_glmv.rl.rewards.verifiers.base import RIGHT, WRONG, Question, Verifier, text_of, wrong
from megatron_glmv.rl.types import Reward, Task

N = TypeVar("N", bound=NumericConfig)


class NumericVerifier(Verifier[N]):
    """What verifiers of numbers and formulas share."""

    numeric: ClassVar[bool] = True
    formulas: ClassVar[bool] = True
    prompt: ClassVar[str] = "formula"

    @property
    def rule(self) -> Rule:
        """When two numbers are equal."""
        return Rule(self.settings.tolerance)

    def compare(self, task: Task, answer: str) -> Reward | Question:
        """Equal as formulas, or the judge."""
        return self.by_formula(task, answer)

    def by_formula(self, task: Task, answer: str) -> Reward | Question:
        """Equal as formulas; a number that is another number is wrong without asking."""
        reference_text = text_of(task.answer)
        try:
            form = read(answer)
        except TooLarge as error:
            return wrong("limit", str(error))
        except NotAnExpression as error:
            return self.ask(task, answer, wrong(detail=str(error)))
        try:
            reference = read(reference_text)
        except (TooLarge, NotAnExpression):
            return self.ask(task, answer, WRONG)
        try:
            verdict = self._same(form, answer, reference, reference_text)
        except (TooLarge, Undefined) as error:
            return wrong("limit" if isinstance(error, TooLarge) else "wrong", str(error))
        if verdict:
            return RIGHT
        return WRONG if verdict is False and _is_number(form) and _is_number(reference) else self.ask(task, answer, WRONG)

    def _same(self, form: Form, answer: str, reference: Form, reference_text: str) -> bool | None:
        """Equal as they are, or without a sign of percent or degrees that only one of them has."""
        verdict = same(form, reference, self.rule)
        if verdict:
            return verdict
        given, wanted = plain(answer), plain(reference_text)
        for sign in ("%", "°") if self.settings.percent_sign == "optional" else ("°",):
            if given.endswith(sign) == wanted.endswith(sign):
                continue
            try:
                without = read((given if given.endswith(sign) else wanted).rstrip(sign + " "))
            except NotAnExpression:
                return verdict
            return same(without, reference, self.rule) if given.endswith(sign) else same(form, without, self.rule)
        return verdict


def _is_number(form: Form) -> bool:
    return form.kind == "value" and (form.node is None or not form.node.symbols())


class MathVerifier(NumericVerifier[MathConfig]):
    """Numbers and formulas."""
