"""The ratio follows the share of useless groups; the groups closest to half right are kept."""

from __future__ import annotations

import json
import math

import pytest

from megatron_glmv.config.rl import ExpansionConfig
from megatron_glmv.rl.expansion import Expansion, balance, is_useful
from megatron_glmv.rl.outcome import outcome_of
from megatron_glmv.rl.types import Group
from tests.rl.groups import make_group


def binary(right: int, size: int = 8, domain: str = "math") -> Group:
    return make_group([1.0] * right + [0.0] * (size - right), domain=domain)


def test_ratio_is_the_one_on_paper_and_is_smoothed():
    expansion = Expansion(ExpansionConfig(ema_decay=0.75, start_ratio=1.0))
    assert expansion.num_prompts(10) == 10
    wave = [binary(8), binary(0), binary(0), binary(3), binary(8), binary(0), binary(1), binary(0)]
    assert expansion.update(wave) == pytest.approx(1 / (1 - 6 / 8))
    assert expansion.ratio_ema == pytest.approx(0.75 * 1 + 0.25 * 4)
    assert expansion.num_prompts(10) == math.ceil(17.5)
    assert expansion.update([binary(4)]) == 1.0
    assert expansion.ratio_ema == pytest.approx(0.75 * 1.75 + 0.25)


def test_ratio_is_capped_where_no_group_is_useful():
    expansion = Expansion(ExpansionConfig(ema_decay=0.0, max_ratio=3.0))
    assert expansion.update([binary(0), binary(8)]) == 3.0
    assert expansion.num_prompts(128) == 384


def test_a_lowered_cap_holds_when_a_run_goes_on():
    first = Expansion(ExpansionConfig(ema_decay=0.0))
    first.update([binary(0), binary(8), binary(8), binary(4)])
    assert first.num_prompts(10) == 40
    second = Expansion(ExpansionConfig(max_ratio=2.0))
    second.load_state_dict(first.state_dict())
    assert second.num_prompts(10) == 20


def test_unjudged_groups_do_not_change_the_ratio():
    expansion = Expansion(ExpansionConfig(ema_decay=0.0))
    down = make_group([None] * 8)
    assert expansion.update([binary(4), down, binary(0), down, make_group([1.0, None])]) == 2.0
    assert expansion.update([down]) == 2.0
    assert expansion.ratio_ema == 2.0
    selection = expansion.select([down, binary(0), binary(4)], 3)
    assert (selection.chosen, selection.num_unjudged) == ((1, 2), 1)


def test_groups_closest_to_half_are_kept():
    wave = [binary(right) for right in (1, 8, 5, 0, 4, 7, 3)]
    selection = Expansion(ExpansionConfig()).select(wave, 3)
    assert selection.chosen == (2, 4, 6)
    assert (selection.num_useful, selection.num_degenerate, selection.num_filled) == (5, 2, 0)


def test_punishments_are_wrong_answers_and_not_a_spread():
    config = ExpansionConfig()
    assert not is_useful(outcome_of(make_group([0.0, -1.0, 0.0, -1.0])), config)
    assert is_useful(outcome_of(make_group([0.0, -1.0, 0.0, -1.0])), ExpansionConfig(rule="spread"))


def test_continuous_rewards_are_judged_by_their_spread():
    config = ExpansionConfig(min_spread=0.1)
    assert not is_useful(outcome_of(make_group([0.90, 0.91, 0.92, 0.95])), config)
    assert is_useful(outcome_of(make_group([0.2, 0.91, 0.4, 0.95])), config)
    assert not is_useful(outcome_of(make_group([0.2, 0.91, 0.4, 0.95])), ExpansionConfig(rule="correct"))


def test_spread_and_share_of_right_answers_agree_on_binary_rewards():
    for right in range(9):
        outcome = outcome_of(binary(right))
        assert balance(outcome, ExpansionConfig()) == pytest.approx(balance(outcome, ExpansionConfig(rule="spread")))


def test_domains_keep_their_places():
    ocr = [make_group([0.5, 0.6, 0.7, 0.8], domain="ocr") for _ in range(4)]
    wave = [*(binary(4) for _ in range(8)), *ocr]
    kept = Expansion(ExpansionConfig()).select(wave, 6)
    assert sum(index >= 8 for index in kept.chosen) == 2
    free = Expansion(ExpansionConfig(keep_proportions=False)).select(wave, 6)
    assert free.chosen == tuple(range(6))


def test_places_that_a_domain_cannot_fill_go_to_others():
    wave = [*(binary(4) for _ in range(6)), *(binary(0, domain="hard") for _ in range(6))]
    selection = Expansion(ExpansionConfig()).select(wave, 6)
    assert (selection.chosen, selection.num_filled) == (tuple(range(6)), 0)


@pytest.mark.parametrize(("fill", "chosen", "filled"), [("degenerate", (0, 1, 2), 2), ("none", (1,), 0)])
def test_too_few_useful_groups(fill: str, chosen: tuple[int, ...], filled: int):
    selection = Expansion(ExpansionConfig(fill=fill)).select([binary(0), binary(2), binary(8), binary(0)], 3)
    assert (selection.chosen, selection.num_filled, selection.num_useful) == (chosen, filled, 1)
    nothing = Expansion(ExpansionConfig(fill=fill)).select([], 3)
    assert nothing.chosen == ()


def test_switched_off_it_takes_the_batch_as_it_came():
    expansion = Expansion(ExpansionConfig(enabled=False, start_ratio=2.0))
    assert expansion.num_prompts(4) == 4
    assert expansion.select([binary(0), binary(4), binary(8)], 2).chosen == (0, 1)


def test_resumes_exactly():
    first = Expansion(ExpansionConfig())
    first.update([binary(0), binary(3), binary(8)])
    second = Expansion(ExpansionConfig())
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.update([binary(0), binary(1)]) == first.update([binary(0), binary(1)])
    assert second.ratio_ema == first.ratio_ema


def test_rounding_does_not_ask_for_one_more():
    expansion = Expansion(ExpansionConfig(ema_decay=0.9, start_ratio=1.1))
    for _ in range(50):
        expansion.ratio_ema = 0.9 * expansion.ratio_ema + 0.1 * 1.1
    assert expansion.num_prompts(10) == 11


def test_waves_follow_until_enough_groups_are_useful_or_the_cap_is_reached():
    expansion = Expansion(ExpansionConfig(method="waves", max_ratio=3.0))
    expansion.update([binary(0), binary(0), binary(4)])
    assert expansion.num_prompts(2) == 2
    useless, useful = [binary(0), binary(8)], [binary(3), binary(5)]
    assert expansion.wants_more(useless, 2, 2)
    assert expansion.wants_more([*useless, binary(3)], 4, 2)
    assert not expansion.wants_more([*useless, *useful], 4, 2)
    assert not expansion.wants_more([*useless, *useless], 6, 2)
    for other in (ExpansionConfig(), ExpansionConfig(method="waves", enabled=False)):
        assert not Expansion(other).wants_more(useless, 2, 2)
