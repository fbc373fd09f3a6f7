"""The form of an answer: a think block, then an answer whose result stands in one box; what is wrong with a text, as codes.

The cold start learns this form, tools that pack and inspect report it, and rewards are only given where it holds.

Source: arXiv 2507.01006, section 4 (think block, answer block, exactly one box for verifiable tasks; GLM-4.5V drops the answer
tags; GLM-4.5V and 4.6V answer without thinking after an empty think block).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

THINK, ANSWER = ("<think>", "</think>"), ("<answer>", "</answer>")
BOX = ("<|begin_of_box|>", "<|end_of_box|>")
TAGS = re.compile("|".join(map(re.escape, (*THINK, *ANSWER, *BOX))))
LATEX_BOX = re.compile(r"\\boxed\s*\{")

Fault = Literal[
    "think_missing", "think_unclosed", "think_repeated", "think_empty", "think_forbidden",
    "answer_missing", "answer_unclosed", "answer_repeated", "answer_empty", "answer_forbidden",
    "box_missing", "box_unclosed", "box_repeated", "box_empty", "box_forbidden", "box_outside_answer",
    "latex_box", "tags_out_of_order", "text_outside",
]  # fmt: skip


@dataclass(frozen=True)
class AnswerFormat:
    """What an answer must look like.

    Attributes:
        think: a think block with text in it, an empty one, either, or none.
        answer_tags: the answer stands between answer tags (GLM-4.1V), or is what follows the think block (4.5V, 4.6V).
        box: one box in the answer, at most one, or none.
    """

    think: Literal["full", "empty", "any", "none"] = "full"
    answer_tags: bool = True
    box: Literal["one", "optional", "none"] = "optional"


@dataclass(frozen=True)
class AnswerParts:
    """An answer taken apart; None where a part is not there or not closed.

    Attributes:
        think: text of the think block.
        answer: text of the answer, box tokens included.
        box: text of its only box.
    """

    think: str | None
    answer: str | None
    box: str | None


def split_answer(text: str, answer_tags: bool = True) -> AnswerParts:
    """The parts of an assistant's turn; what cannot be told apart without doubt is None."""
    think = _only(text, THINK)
    rest = text.rpartition(THINK[1])[2] if THINK[1] in text else text
    answer: str | None = rest
    if answer_tags:
        answer = _only(rest, ANSWER)
    elif any(tag in rest for tag in (*THINK, *ANSWER)):
        answer = None
    return AnswerParts(think, answer, None if answer is None else _only(answer, BOX))


def check_answer(text: str, form: AnswerFormat) -> list[Fault]:
    """What is wrong with an assistant's turn.

    Args:
        text: the turn without its role token and the token that ends it.
        form: what it must look like.

    Returns:
        Codes in a fixed order, each once; none for a good answer.
    """
    faults: list[Fault] = []
    tags = TAGS.findall(text)
    faults += _check_pair(tags, THINK, "think", {"full": 1, "empty": 1, "any": None, "none": 0}[form.think])
    faults += _check_pair(tags, ANSWER, "answer", int(form.answer_tags))
    faults += _check_pair(tags, BOX, "box", {"one": 1, "optional": None, "none": 0}[form.box])
    if LATEX_BOX.search(text):
        faults.append("latex_box")
    if faults:
        return faults
    return _check_order(text, tags, form)


def _check_pair(tags: list[str], pair: tuple[str, str], name: str, wanted: int | None) -> list[Fault]:
    """How often a pair of tags stands: exactly `wanted` times, or at most once."""
    opened, closed = tags.count(pair[0]), tags.count(pair[1])
    if not opened and not closed:
        return [f"{name}_missing"] if wanted else []  # type: ignore[list-item]
    if wanted == 0:
        return [f"{name}_forbidden"]  # type: ignore[list-item]
    if opened > 1 or closed > 1:
        return [f"{name}_repeated"]  # type: ignore[list-item]
    return [f"{name}_unclosed"] if opened != closed else []  # type: ignore[list-item]


def _check_order(text: str, tags: list[str], form: AnswerFormat) -> list[Fault]:
    """Faults of a text that has every tag as often as it should."""
    expected = [tag for pair in (THINK, ANSWER) if pair[0] in tags for tag in pair]
    if [tag for tag in tags if tag not in BOX] != expected:
        return ["tags_out_of_order"]
    faults: list[Fault] = []
    parts = split_answer(text, form.answer_tags)
    if BOX[0] in tags:
        if tags.index(BOX[0]) > tags.index(BOX[1]):
            return ["tags_out_of_order"]
        boxes = (parts.answer or "").count(BOX[0]), (parts.answer or "").count(BOX[1])
        if boxes != (1, 1):
            faults.append("box_outside_answer")
        elif not (parts.box or "").strip():
            faults.append("box_empty")
    if parts.think is not None and form.think != "any" and bool(parts.think.strip()) != (form.think == "full"):
        faults.append("think_empty" if form.think == "full" else "think_forbidden")
    if not (parts.answer or "").strip():
        faults.append("answer_empty")
    before, _, behind = text.partition(THINK[0]) if parts.think is not None else ("", "", text)
    between = behind.partition(THINK[1])[2] if parts.think is not None else text
    outside = before + (between.partition(ANSWER[0])[0] + text.partition(ANSWER[1])[2] if form.answer_tags else "")
    if outside.strip():
        faults.append("text_outside")
    return faults


def _only(text: str, pair: tuple[str, str]) -> str | None:
    """What stands between the only pair of tags, or None."""
    if text.count(pair[0]) != 1 or text.count(pair[1]) != 1:
        return None
    start, end = text.index(pair[0]) + len(pair[0]), text.index(pair[1])
    return text[start:end] if start <= end else None
