"""Advantages of a group's answers over each other, as GRPO defines them.

An answer whose verifier could not say (`Reward.value` is None) is no evidence: it enters neither mean nor deviation and is not
trained on. A group of equal rewards gives exactly zero, and so do rewards that differ by rounding, which a division by their
deviation would blow up.

Source: Shao et al., arXiv 2402.03300, section 4.1 (GRPO); Liu et al., arXiv 2503.20783 (without division by the deviation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_glmv.config.rl import AlgorithmConfig
from megatron_glmv.rl.types import Group

EQUAL_WITHIN = 1e-6
"""Rewards that differ by no more than this are equal."""


@dataclass(frozen=True)
class GroupAdvantages:
    """Advantages of some groups and what was found in them.

    Attributes:
        values: for each group, for each answer its advantage; None: masked, which has no weight in the loss.
        num_masked: answers without a reward.
        num_small: groups with fewer than two rewards, whose advantages are zero.
        num_equal: groups of two or more rewards that are all equal, whose advantages are zero.
    """

    values: tuple[tuple[float | None, ...], ...]
    num_masked: int
    num_small: int
    num_equal: int


def advantages_of(rewards: Sequence[float | None], *, divide_by_std: bool) -> tuple[float | None, ...]:
    """Advantages within one group.

    Args:
        rewards: of each answer; None is masked.
        divide_by_std: divide by the standard deviation of the group (of the population, not of a sample of it).

    Returns:
        For each answer its reward less the mean of the group's rewards, or None where the reward is.

    Raises:
        ValueError: a reward that is not finite.
    """
    known = [reward for reward in rewards if reward is not None]
    if not all(math.isfinite(reward) for reward in known):
        raise ValueError(f"rewards {known}: not all are finite; a verifier that cannot say must give None")
    if len(known) < 2 or _are_equal(known):
        return tuple(None if reward is None else 0.0 for reward in rewards)
    mean = math.fsum(known) / len(known)
    scale = 1.0
    if divide_by_std:
        scale = math.sqrt(math.fsum((reward - mean) ** 2 for reward in known) / len(known))
    return tuple(None if reward is None else (reward - mean) / scale for reward in rewards)


def group_advantages(groups: Sequence[Group], config: AlgorithmConfig) -> GroupAdvantages:
    """Advantages of every answer of every group, and counts."""
    values, masked, small, equal = [], 0, 0, 0
    for group in groups:
        rewards = [answer.reward.value for answer in group.answers]
        known = [reward for reward in rewards if reward is not None]
        values.append(advantages_of(rewards, divide_by_std=config.divide_by_std))
        masked += len(rewards) - len(known)
        small += len(known) < 2
        equal += len(known) >= 2 and _are_equal(known)
    return GroupAdvantages(tuple(values), masked, small, equal)


def _are_equal(rewards: Sequence[float]) -> bool:
    return max(rewards) - min(rewards) <= EQUAL_WITHIN
