"""What the rewards of one group say about its prompt: how often it was answered right, and how far the answers differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_glmv.rl.types import Group


@dataclass(frozen=True)
class Outcome:
    """Of the judged answers of one group; masked ones do not count.

    Attributes:
        num_judged: answers with a reward.
        pass_rate: share of right ones, 0 where none is judged.
        spread: standard deviation of the rewards, 0 where none is judged.
        is_binary: every reward is 1, or at most 0; punishments below 0 are wrong answers.
    """

    num_judged: int
    pass_rate: float
    spread: float
    is_binary: bool


def outcome_of(group: Group) -> Outcome:
    """Read a group's rewards."""
    rewards = [answer.reward for answer in group.answers if answer.reward.value is not None]
    values = [reward.value for reward in rewards if reward.value is not None]
    if not values:
        return Outcome(0, 0.0, 0.0, True)
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    right = sum(reward.correct is True for reward in rewards)
    return Outcome(len(values), right / len(values), spread, all(value == 1 or value <= 0 for value in values))
