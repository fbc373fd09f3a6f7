"""Chemistry: formulas and reactions in one spelling, then quantities as in physics."""

from __future__ import annotations

import re
import unicodedata

from megatron_glmv.config.rewards import ChemistryConfig
from megatron_glmv.rl.rewards.notation import MAX_CHARACTERS
from megatron_glmv.rl.rewards.verifiers.base import RIGHT, WRONG, Question, text_of
from megatron_glmv.rl.rewards.verifiers.physics import UnitsVerifier
from megatron_glmv.rl.types import Reward, Task

_WRAPPER = re.compile(r"\\(?:ce|text|mathrm|rm)\s*\{((?:[^{}]|\{[^{}]{0,20}\}){0,500})\}")
_ARROW = re.compile(r"\\(?:long)?rightarrow|\\to(?![a-z])|\\rightleftharpoons|→|⟶|⇌|<=>|=>|->|=")
_PLUS = re.compile(r"\s\+\s|(?<!\s)\+(?=\d{0,4}[A-Z(\[])")
"""Between two species; elsewhere it is a charge."""
_CATION = re.compile(r"([A-Z][a-z])\^(\d\+)")
"""Fe^3+ is Fe3+; of one letter it could be O_2^+."""
_SPECIES = re.compile(r"(\d{0,4})((?:[A-Z][a-z]?|[()\[\]\d.·+^-]){1,60})")


def formula(text: str) -> tuple[tuple[str, ...], ...] | None:
    """The sides of a reaction, or one formula, as sorted species in one spelling; None if it is neither."""
    if not text.strip() or len(text) > MAX_CHARACTERS:
        return None
    text = _WRAPPER.sub(r"\1", _WRAPPER.sub(r"\1", text.replace("$", "")))
    text = unicodedata.normalize("NFKC", _ARROW.sub(" → ", text))
    sides = []
    for side in text.split("→"):
        species = [_CATION.sub(r"\1\2", re.sub(r"[\s_{}\\]", "", part)) for part in _PLUS.split(side.strip())]
        if not all(_SPECIES.fullmatch(part) and re.search("[A-Z]", part) for part in species):
            return None
        sides.append(tuple(sorted(species)))
    return tuple(sides)


class ChemistryVerifier(UnitsVerifier[ChemistryConfig]):
    """Numbers with units, formulas, reactions."""

    def compare(self, task: Task, answer: str) -> Reward | Question:
        """Equal as formulas of substances, else as in physics."""
        reference = formula(text_of(task.answer))
        if reference is not None and formula(answer) == reference:
            return RIGHT
        return super().compare(task, answer)

    def by_formula(self, task: Task, answer: str) -> Reward | Question:
        """Substances are no products of letters: of two that differ the judge says whether they are the same."""
        if formula(answer) is not None and formula(text_of(task.answer)) is not None:
            return self.ask(task, answer, WRONG)
        return super().by_formula(task, answer)
