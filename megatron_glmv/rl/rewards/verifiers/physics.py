"""Numbers with units, in base units: 3 m is 300 cm; what has no readable unit is compared as in mathematics.

Source: arXiv 2507.01006, section 5.2 (units: judge); here units are read first, and what they leave open goes to the judge.
zai-org/GLM-V 8fc9756 sent "3 m" = "3 m" to the judge.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

from megatron_glmv.config.rewards import PhysicsConfig, UnitsConfig
from megatron_glmv.rl.rewards.evaluation import Undefined, close
from megatron_glmv.rl.rewards.expression import NotAnExpression
from megatron_glmv.rl.rewards.notation import TooLarge
from megatron_glmv.rl.rewards.units import BASES, Quantity, read_quantity
from megatron_glmv.rl.rewards.verifiers.base import RIGHT, WRONG, Question, text_of, wrong
from megatron_glmv.rl.rewards.verifiers.math import NumericVerifier
from megatron_glmv.rl.types import Reward, Task

U = TypeVar("U", bound=UnitsConfig)
_ANGLE = BASES.index("rad")


class UnitsVerifier(NumericVerifier[U]):
    """What verifiers of quantities share."""

    prompt: ClassVar[str] = "quantity"

    def compare(self, task: Task, answer: str) -> Reward | Question:
        """Equal as quantities, else as formulas, else the judge."""
        try:
            reference = read_quantity(text_of(task.answer))
        except (NotAnExpression, TooLarge, Undefined):
            return self.by_formula(task, answer)
        try:
            quantity = read_quantity(answer)
        except TooLarge as error:
            return wrong("limit", str(error))
        except (NotAnExpression, Undefined):
            return self.by_formula(task, answer)
        if quantity.dimension is None and reference.dimension is None:
            return self.by_formula(task, answer)
        return self._compare(task, answer, quantity, reference)

    def _compare(self, task: Task, answer: str, quantity: Quantity, reference: Quantity) -> Reward | Question:
        tolerance = self.settings.tolerance
        if quantity.dimension is None or reference.dimension is None:
            # 3 for 3 m, or 3 m for 3: the question may name the unit, which only a reader of the question can say.
            if _without_dimension(quantity, reference) and close(quantity.value, reference.value, tolerance):
                return RIGHT
            if not close(quantity.number, reference.number, tolerance):
                return WRONG if quantity.dimension is None else self.ask(task, answer, WRONG)
            return (
                RIGHT if self.settings.missing_unit == "accept" else self.ask(task, answer, wrong(detail="a unit is missing"))
            )
        if _without_angle(quantity) != _without_angle(reference):
            return wrong(detail="the units are of different quantities")
        return RIGHT if close(quantity.value, reference.value, tolerance) else WRONG


def _without_angle(quantity: Quantity) -> tuple[int, ...]:
    """A dimension in which radians count as 1, as the SI has them."""
    powers = quantity.dimension or ()
    return tuple(power for place, power in enumerate(powers) if place != _ANGLE)


def _without_dimension(*quantities: Quantity) -> bool:
    """Whether all are pure numbers: percent, degrees, or no unit."""
    return not any(any(_without_angle(quantity)) for quantity in quantities)


class PhysicsVerifier(UnitsVerifier[PhysicsConfig]):
    """Numbers with units, and formulas."""
