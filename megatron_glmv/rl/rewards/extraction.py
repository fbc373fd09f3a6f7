"""From the text of a response to its final answer: thinking, answer part, and the one box.

Written as a scan for fixed tags, so that a text of any size and shape is read in one pass and nothing in it is evaluated.

Source: arXiv 2507.01006, sections 4.1 and 5.2 (think block, answer block, exactly one box span inside the answer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_glmv.config.rewards import FormatGate

THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"
BOX, END_BOX = "<|begin_of_box|>", "<|end_of_box|>"
TAGS = (THINK, END_THINK, ANSWER, END_ANSWER, BOX, END_BOX)


class Refused(Exception):
    """A gate does not let an answer through.

    Attributes:
        reason: the code of the reward: format, limit, language, repetition.
        value: what such an answer is worth.
    """

    def __init__(self, reason: str, detail: str, value: float) -> None:
        super().__init__(detail)
        self.reason = reason
        self.value = value


@dataclass(frozen=True)
class Response:
    """The parts of a response.

    Attributes:
        thought: text of the think block, or "".
        answer: text of the answer part, box tokens included.
        final: what the verifier reads: the text of the box, or the answer part where there is none; ends stripped.
    """

    thought: str
    answer: str
    final: str


def extract(text: str, gate: FormatGate, box: Literal["one", "optional", "none"]) -> Response:
    """Take a response apart.

    Args:
        text: as sampled, special tokens kept.
        gate: the shape it must have.
        box: how many box spans the answer part may hold.

    Raises:
        Refused: the shape is another one, or the text is too long; reason format or limit.
    """
    if len(text) > gate.max_characters:
        raise Refused("limit", f"{len(text)} characters, more than {gate.max_characters}", gate.reward)
    thought, rest = _split_thought(_without_stop_tokens(text, gate.stop_tokens), gate)
    answer = _answer_part(rest, gate)
    if any(tag in part for tag in (THINK, END_THINK, ANSWER, END_ANSWER) for part in (thought, answer)):
        raise Refused("format", "a think or answer tag occurs twice or inside another", gate.reward)
    if not gate.latex_box and "\\boxed{" in answer:
        raise Refused("format", "\\boxed{ in the answer", gate.reward)
    return Response(thought.strip(), answer, _final(text, answer, gate, box).strip())


def _without_stop_tokens(text: str, stop_tokens: tuple[str, ...]) -> str:
    text = text.strip()
    while text.endswith(stop_tokens):
        for token in stop_tokens:
            text = text.removesuffix(token).rstrip()
    return text


def _split_thought(text: str, gate: FormatGate) -> tuple[str, str]:
    """The think block and what follows it."""
    begins = text.startswith(THINK)
    end = text.find(END_THINK)
    if (begins or gate.think == "opened") and end >= 0:
        return text[len(THINK) if begins else 0 : end], text[end + len(END_THINK) :].strip()
    if gate.think == "optional" and not begins:
        return "", text
    missing = END_THINK if begins or gate.think == "opened" else THINK
    raise Refused("format", f"no {missing}", gate.reward)


def _answer_part(rest: str, gate: FormatGate) -> str:
    if rest.startswith(ANSWER) and rest.endswith(END_ANSWER):
        return rest[len(ANSWER) : -len(END_ANSWER)]
    if gate.answer == "optional" and ANSWER not in rest and END_ANSWER not in rest:
        return rest
    raise Refused("format", f"what follows the thinking is not {ANSWER}...{END_ANSWER}", gate.reward)


def _final(text: str, answer: str, gate: FormatGate, box: str) -> str:
    """The text of the box; box tokens outside the answer part count as faults."""
    begins, ends = text.count(BOX), text.count(END_BOX)
    if begins == ends == 0 and box != "one":
        return answer
    if box == "none":
        raise Refused("format", "box tokens in an answer that is not to be checked", gate.reward)
    start, end = answer.find(BOX), answer.find(END_BOX)
    if begins != 1 or ends != 1 or start < 0 or end < start:
        raise Refused("format", f"{begins} x {BOX} and {ends} x {END_BOX}, wanted one span in the answer", gate.reward)
    return answer[start + len(BOX) : end]
