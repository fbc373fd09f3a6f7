"""Advantages are centred within a group; equal rewards give exactly zero; masked answers are no evidence."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_glmv.config.rl import AlgorithmConfig
from megatron_glmv.rl.advantage import advantages_of, group_advantages
from tests.rl.groups import make_group


def test_advantages_are_centred_and_scaled():
    rewards = [1.0, 0.0, 0.25, -0.5, 1.0]
    centred = np.array(rewards) - np.mean(rewards)
    assert advantages_of(rewards, divide_by_std=False) == pytest.approx(tuple(centred))
    assert advantages_of(rewards, divide_by_std=True) == pytest.approx(tuple(centred / np.std(rewards)))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, -0.7])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_equal_rewards_give_exactly_zero(value: float, size: int):
    for divide in (False, True):
        assert advantages_of([value] * size, divide_by_std=divide) == (0.0,) * size


def test_rewards_that_differ_by_rounding_are_equal():
    assert advantages_of([0.1 + 0.2, 0.3, 0.3], divide_by_std=True) == (0.0, 0.0, 0.0)


def test_masked_answers_do_not_count():
    with_masked = advantages_of([1.0, None, 0.0, None, 0.0], divide_by_std=True)
    assert with_masked[1] is None
    assert with_masked[3] is None
    assert tuple(value for value in with_masked if value is not None) == advantages_of([1.0, 0.0, 0.0], divide_by_std=True)


def test_groups_are_counted():
    rewards = ([1.0, 0.0], [None, 1.0, None], [None, None], [0.5, 0.5], [1.0, None, 0.0])
    result = group_advantages([make_group(values, key=str(number)) for number, values in enumerate(rewards)], AlgorithmConfig())
    assert (result.num_masked, result.num_small, result.num_equal) == (5, 2, 1)
    assert result.values[0] == (1.0, -1.0)
    assert result.values[1] == (None, 0.0, None)
    assert result.values[2] == (None, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused(bad: float):
    with pytest.raises(ValueError, match="finite"):
        advantages_of([1.0, bad], divide_by_std=False)
