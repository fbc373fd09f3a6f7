"""Short answers: equal text, the right option, an equal number, or the judge.

Source: arXiv 2507.01006, section 5.2 (VQA, spatial, video: exact, then judge).
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal, TypeVar

from megatron_glmv.config.rewards import ShortAnswerConfig
from megatron_glmv.rl.rewards.evaluation import Undefined, close
from megatron_glmv.rl.rewards.expression import Node, NotAnExpression
from megatron_glmv.rl.rewards.forms import Form, Rule, read, same
from megatron_glmv.rl.rewards.notation import TooLarge, folded
from megatron_glmv.rl.rewards.units import read_quantity
from megatron_glmv.rl.rewards.verifiers.base import RIGHT, WRONG, BadReference, Question, Verifier, text_of, wrong
from megatron_glmv.rl.types import Reward, Task

A = TypeVar("A", bound=ShortAnswerConfig)
_LETTER = re.compile(r"(?:option |choice )?\(?([a-h])\)?(?:\s*[.):]\s*(.{0,400}))?", re.DOTALL)
_OPTION = re.compile(r"[A-H]")


class ShortAnswerVerifier(Verifier[A]):
    """What verifiers of short answers share."""

    def compare(self, task: Task, answer: str) -> Reward | Question:
        """The option, the number, or the judge."""
        reference = text_of(task.answer)
        if _OPTION.fullmatch(reference.strip().strip("().")):
            return self._option(task, answer, reference.strip().strip("()."))
        if _same_quantity(answer, reference, self.settings.tolerance):
            return RIGHT
        try:
            form = read(answer)
        except TooLarge as error:
            # A long text is no formula: only what could have been a number is refused here.
            return wrong("limit", str(error)) if not any(map(str.isalpha, answer)) else self.ask(task, answer, WRONG)
        except NotAnExpression:
            return self.ask(task, answer, WRONG)
        return self._number(task, answer, form, reference)

    def _number(self, task: Task, answer: str, form: Form, reference: str) -> Reward | Question:
        try:
            wanted = read(reference)
            verdict = same(form, wanted, Rule(self.settings.tolerance))
        except (NotAnExpression, Undefined):
            return self.ask(task, answer, WRONG)
        except TooLarge as error:
            return wrong("limit", str(error))
        if verdict and _is_plain(form, wanted):
            return RIGHT
        numbers = form.whole is not None and wanted.whole is not None
        return WRONG if numbers else self.ask(task, answer, WRONG)

    def _option(self, task: Task, answer: str, letter: str) -> Reward | Question:
        """The letter, with or without the option's text; or the option's text alone."""
        choices = self.settings.choices
        place = ord(letter) - ord("A")
        if choices and place >= len(choices):
            raise BadReference(f"the reference is option {letter} of {len(choices)}")
        found = _LETTER.fullmatch(folded(answer))
        if found is not None:
            text = folded(found[2] or "")
            if found[1].upper() != letter or (choices and text and text != folded(choices[place])):
                return WRONG
            return RIGHT
        if choices:
            same_text = [number for number, choice in enumerate(choices) if folded(choice) == folded(answer)]
            if same_text:
                return RIGHT if same_text == [place] else WRONG
        return self.ask(task, answer, WRONG)


def _same_quantity(answer: str, reference: str, tolerance: float) -> bool:
    """Whether both are plain numbers with units, and equal: 3.5 m and 350 centimeters."""
    try:
        given, wanted = read_quantity(answer), read_quantity(reference)
    except (NotAnExpression, TooLarge, Undefined):
        return False
    same_unit = given.dimension is not None and given.dimension == wanted.dimension
    return same_unit and _are_numbers(given.node, wanted.node) and close(given.value, wanted.value, tolerance)


def _is_plain(answer: Form, reference: Form) -> bool:
    """Whether both are plain numbers, or tuples of such: of words no formula says whether they are equal."""
    if answer.kind == reference.kind == "tuple":
        return all(map(_is_plain, answer.items, reference.items))
    if answer.whole is not None and reference.whole is not None:
        return True
    return answer.node is not None and reference.node is not None and _are_numbers(answer.node, reference.node)


def _are_numbers(answer: Node, reference: Node) -> bool:
    """Whether both are written as one number, and not as two fractions: 1/2 is 0.5, but 3/4 need not be 6/8."""
    kinds = {_writing(answer), _writing(reference)}
    return "other" not in kinds and (kinds != {"fraction"} or answer == reference)


def _writing(node: Node) -> Literal["decimal", "fraction", "other"]:
    """How a value is written: 5, 50%, 2*10^3; 1/2, 1 1/2; 2-1, 2*3, 12/6 may be a score, a size, a date."""
    match node:
        case Node("negative", (inner,)):
            return _writing(inner)
        case Node("product" as kind, (Node("negative", (inner,)), *rest)):
            return _writing(Node(kind, (inner, *rest)))
        case Node("number") | Node("product", (Node("number"), Node("power", (Node("number", value=10), _)))):
            return "decimal"
        case Node("product", (Node("number"), Node("number", value=percent))) if percent == Fraction(1, 100):
            return "decimal"
        case Node("product", (Node("number", value=above), Node("inverse", (Node("number", value=below),)))) if above < below:
            return "fraction"
        case Node("sum", (Node("number"), Node("product") as part)) if _writing(part) == "fraction":
            return "fraction"
    return "other"
