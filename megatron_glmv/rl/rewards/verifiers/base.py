"""What every verifier is: settings in, one method that takes a task and the final answer, and what comes out.

All are called through `Verifier.verify(task, answer)`, which is not overridden; a domain writes `compare(task, answer)`. So no
verifier has a signature of its own, and the length limit, the exact match and the hack detectors are the same everywhere.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar, final

from megatron_glmv.config.base import InputError
from megatron_glmv.config.rewards import DomainConfig, JudgedConfig
from megatron_glmv.rl.rewards.hacks import find_hack
from megatron_glmv.rl.rewards.notation import TooLarge, folded, number_word, spelled
from megatron_glmv.rl.rewards.units import has_unit
from megatron_glmv.rl.types import Reward, Task

_NUMBER_FIRST = re.compile(r"\W{0,4}\d")
S = TypeVar("S", bound=DomainConfig)


class BadReference(InputError):
    """A task's reference answer is not what its verifier reads; its answers are masked."""


@dataclass(frozen=True)
class Question:
    """What the rules could not say, for the judge or the reward model.

    Attributes:
        prompt: name of the prompt in rewards/prompts, or the path of another.
        graded: whether a score in [0, 1] is asked for instead of correct or incorrect.
        question, reference, answer: texts for the prompt.
        without: the reward where there is nobody to ask.
        correct_from: score from which a graded answer counts as correct.
        scored: whether the reward model is asked first.
        media: pictures of the task.
    """

    prompt: str
    graded: bool
    question: str
    reference: str
    answer: str
    without: Reward
    correct_from: float = 1.0
    scored: bool = False
    media: tuple[str, ...] = ()


class Verifier(ABC, Generic[S]):
    """The verifier of one domain. It holds settings and no state, so an answer's reward depends on nothing before it.

    Args:
        settings: of the domain, the sample's own over them.
    """

    numeric: ClassVar[bool] = False
    """Whether a number is always asked for."""
    formulas: ClassVar[bool] = False
    """Whether answers are formulas, in which case counts."""
    prompt: ClassVar[str] = "short_answer"
    """Name of the judge's prompt."""
    exact: ClassVar[bool] = True
    """Whether an answer whose text is the reference's is right before anything else is looked at."""

    def __init__(self, settings: S) -> None:
        self.settings = settings

    @final
    def verify(self, task: Task, answer: str) -> Reward | Question:
        """Judge one final answer.

        Args:
            task: what was asked, with the reference.
            answer: text of the box, or of the answer part where the domain wants no box.

        Returns:
            The reward, or what to ask the judge.

        Raises:
            BadReference: the task's reference cannot be read.
        """
        if len(answer) > self.settings.max_answer_characters:
            return wrong("limit", f"{len(answer)} characters, more than {self.settings.max_answer_characters}")
        reference = "" if task.answer is None or isinstance(task.answer, list | tuple | dict) else text_of(task.answer)
        if self.exact and reference and (_same_formula if self.formulas else _same_text)(answer, reference):
            return RIGHT
        numeric = self.numeric or number_word(reference) is not None or _NUMBER_FIRST.match(reference) is not None
        hack = find_hack(answer, reference, task.question, self.settings.hacks, numeric=numeric)
        if hack is not None:
            return Reward(self.settings.hack_reward, False, f"hack: {hack[0]}", f"{hack[1]!r} in {answer[:120]!r}")
        return self.compare(task, answer)

    @abstractmethod
    def compare(self, task: Task, answer: str) -> Reward | Question:
        """The rules of the domain; arguments and result as of `verify`."""

    def continuous(self, value: float, detail: str = "") -> Reward:
        """A reward in [0, 1]; from `correct_from` on it counts as correct."""
        correct = value >= self.settings.correct_from
        return Reward(value, correct, "right" if correct else "partial" if value > 0 else "wrong", detail)

    def ask(self, task: Task, answer: str, without: Reward, *, graded: bool = False) -> Reward | Question:
        """Ask the judge, if the domain may and there is something to judge; else `without`."""
        if not isinstance(self.settings, JudgedConfig) or not self.settings.judge or not answer.strip():
            return without
        correct_from = self.settings.correct_from
        return Question(
            str(self.settings.prompt or self.prompt),
            graded,
            task.question,
            text_of(task.answer),
            answer,
            without,
            correct_from,
            media=task.media,
        )


def _same_formula(answer: str, reference: str) -> bool:
    try:
        return spelled(answer) == spelled(reference) != ""
    except TooLarge:
        return False


def _same_text(answer: str, reference: str) -> bool:
    """Whether two texts are the same but for case, which counts where both are numbers with units: 5 MW is not 5 mW."""
    if folded(answer) != folded(reference):
        return False
    return folded(answer, cased=True) == folded(reference, cased=True) or not (has_unit(answer) and has_unit(reference))


RIGHT = Reward(1.0, True, "right")
WRONG = Reward(0.0, False, "wrong")
NO_JUDGE = Reward(None, None, "no_judge", "only a judge can tell, and none is configured")


def wrong(reason: str = "wrong", detail: str = "") -> Reward:
    """A reward of 0."""
    return Reward(0.0, False, reason, detail)


def text_of(reference: Any) -> str:
    """A reference that is one text or number.

    Raises:
        BadReference: it is something else, or nothing.
    """
    if isinstance(reference, bool) or not isinstance(reference, str | int | float):
        raise BadReference(f"the reference is {type(reference).__name__}, wanted a text or a number")
    return str(reference)
