"""Whole numbers, equal or not; digits or words, alone or with the thing that was counted.

Source: arXiv 2507.01006, section 5.2. zai-org/GLM-V 8fc9756 gave 0 to every answer, because its extraction refused answer tags.
"""

from __future__ import annotations

import re
from typing import ClassVar

from megatron_glmv.config.rewards import CountingConfig
from megatron_glmv.rl.rewards.forms import whole_number
from megatron_glmv.rl.rewards.notation import TooLarge, number_word, plain
from megatron_glmv.rl.rewards.verifiers.base import RIGHT, WRONG, BadReference, Question, Verifier, text_of, wrong
from megatron_glmv.rl.types import Reward, Task

_MEASURES = "个只头匹辆人本张条颗朵棵座件把位名块台架支"
_THERE_ARE = re.compile(r"^(?:there (?:are|is)\s|一共|总共|共|有)+", re.IGNORECASE)
_HAN = "零一二两三四五六七八九十百"
_HAN_COUNT = re.compile(rf"(\d+|[{_HAN}]+)\s*[{_MEASURES}][^\W\d_{_HAN}千万半多余以不到至]{{0,8}}")
"""三只猫: a number, a measure, a thing; no 三个半, 三个多, 三个以上."""


def count(text: str) -> int | None:
    """The number in "3", "3.0", "three", "there are 3 dogs", "三只猫"; None where there is none, or more than one."""
    text = _THERE_ARE.sub("", plain(text)).strip()
    if found := _HAN_COUNT.fullmatch(text):
        text = found[1]
    if (whole := whole_number(text)) is not None:
        return whole
    words = text.split()
    if not words or len(words) > 6:
        return None
    for length in (2, 1):
        head, rest = " ".join(words[:length]), words[length:]
        value = whole_number(head)
        if value is not None and not any(re.search(r"\d", word) or number_word(word) is not None for word in rest):
            return value if all(word.replace("-", "").isalpha() for word in rest) else None
    return None


class CountingVerifier(Verifier[CountingConfig]):
    """Whole numbers."""

    numeric: ClassVar[bool] = True
    prompt: ClassVar[str] = "short_answer"

    def compare(self, task: Task, answer: str) -> Reward | Question:
        """Equal whole numbers."""
        reference = count(text_of(task.answer))
        if reference is None:
            raise BadReference(f"the reference {text_of(task.answer)[:60]!r} is not a whole number")
        try:
            value = count(answer)
        except TooLarge as error:
            return wrong("limit", str(error))
        if value is None:
            return self.ask(task, answer, wrong(detail="not one whole number"))
        return RIGHT if value == reference else WRONG
