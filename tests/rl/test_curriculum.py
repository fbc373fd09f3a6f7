"""Draws keep proportions, move to the middle, repeat nothing needlessly, and go on exactly after a stop."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from megatron_glmv.config.base import ConfigError, validate
from megatron_glmv.config.rl import CurriculumConfig
from megatron_glmv.rl.curriculum import Curriculum, CurriculumError
from megatron_glmv.rl.grading import TIERS
from megatron_glmv.rl.types import Group, Task
from tests.rl.groups import make_group


def make_tasks(count: int, domains: tuple[str, ...] = ("math",), subcategories: tuple[str, ...] = ("",)) -> list[Task]:
    return [
        Task(f"p{i}", domains[i % len(domains)], "", "", subcategories[i // len(domains) % len(subcategories)])
        for i in range(count)
    ]


def spread_rates(tasks: list[Task]) -> dict[str, float]:
    """Pass rates that put a fifth of the prompts in each tier."""
    return {task.key: (0.05, 0.2, 0.5, 0.8, 0.95)[i // 7 % 5] for i, task in enumerate(tasks)}


def answered(key: str, right: int, size: int = 8, domain: str = "math", subcategory: str = "") -> Group:
    return make_group([1.0] * right + [0.0] * (size - right), key, domain, subcategory)


def answer_all(keys: list[str], tasks: dict[str, Task], ability: dict[str, float], iteration: int) -> list[Group]:
    random = np.random.default_rng(iteration)
    return [
        answered(key, int(random.binomial(8, ability[key])), domain=tasks[key].domain, subcategory=tasks[key].subcategory)
        for key in keys
    ]


def test_tier_weights_move_from_start_to_target():
    config = CurriculumConfig(start_weights=(0.2, 0.2, 0.2, 0.2, 0.2), target_weights=(0, 0.25, 0.5, 0.25, 0), tier_rate=0.5)
    curriculum = Curriculum(make_tasks(3), config, seed=0)
    assert curriculum.tier_weights(0) == pytest.approx([0.2] * 5)
    assert curriculum.tier_weights(1) == pytest.approx([0.1, 0.225, 0.35, 0.225, 0.1])
    assert curriculum.tier_weights(60) == pytest.approx([0, 0.25, 0.5, 0.25, 0])


@pytest.mark.parametrize(("iteration", "shares"), [(0, (0.2,) * 5), (500, (0.05, 0.25, 0.4, 0.25, 0.05))])
def test_draws_follow_the_tier_weights(iteration: int, shares: tuple[float, ...]):
    tasks = make_tasks(1000)
    rates = spread_rates(tasks)
    curriculum = Curriculum(tasks, CurriculumConfig(), seed=1, offline=rates)
    drawn = curriculum.draw(iteration, 100)
    counts = Counter(rates[key] for key in drawn)
    assert [counts[rate] for rate in (0.05, 0.2, 0.5, 0.8, 0.95)] == pytest.approx([100 * share for share in shares], abs=1)


def test_proportions_of_domains_and_subcategories():
    tasks = make_tasks(1200, ("math", "ocr", "video"), ("a", "b"))
    config = CurriculumConfig(domains={"math": 3, "ocr": 1.5}, subcategories={"math": {"a": 3}})
    curriculum = Curriculum(tasks, config, seed=2, offline=spread_rates(tasks))
    by_key = {task.key: task for task in tasks}
    counts = Counter((by_key[key].domain, by_key[key].subcategory) for key in curriculum.draw(0, 110))
    expected = {
        ("math", "a"): 45,
        ("math", "b"): 15,
        ("ocr", "a"): 15,
        ("ocr", "b"): 15,
        ("video", "a"): 10,
        ("video", "b"): 10,
    }
    assert counts == pytest.approx(expected, abs=1)


def test_subcategories_in_the_middle_are_preferred():
    tasks = make_tasks(300, ("math",), ("easy", "middle", "hopeless"))
    by_key = {task.key: task for task in tasks}
    ability = {task.key: {"easy": 1.0, "middle": 0.5, "hopeless": 0.0}[task.subcategory] for task in tasks}
    counts = {}
    for focus in (0.0, 1.0):
        config = CurriculumConfig(subcategory_focus=focus, drop_trivial_after=None, drop_unsolvable_after=None)
        curriculum = Curriculum(tasks, config, seed=0)
        curriculum.observe(0, answer_all(curriculum.draw(0, 60), by_key, ability, 0))
        counts[focus] = Counter(by_key[key].subcategory for key in curriculum.draw(1, 60))
    assert counts[0.0] == {"easy": 20, "middle": 20, "hopeless": 20}
    assert counts[1.0]["middle"] > 50
    assert min(counts[1.0].values()) >= 2


def test_nothing_repeats_before_all_came():
    tasks = make_tasks(60)
    curriculum = Curriculum(tasks, CurriculumConfig(), seed=3)
    first = [key for iteration in range(4) for key in curriculum.draw(iteration, 15)]
    second = [key for iteration in range(4, 8) for key in curriculum.draw(iteration, 15)]
    assert sorted(first) == sorted(second) == sorted(task.key for task in tasks)
    assert first != second


def test_a_draw_repeats_only_what_it_must():
    curriculum = Curriculum(make_tasks(10, ("a", "b")), CurriculumConfig(domains={"a": 9}), seed=0)
    assert sorted(curriculum.draw(0, 10)) == sorted(f"p{i}" for i in range(10))
    assert sorted(Counter(curriculum.draw(1, 25)).values()) == [2] * 5 + [3] * 5
    assert curriculum.draw(2, 0) == []


def test_small_domains_get_their_share_over_time():
    tasks = make_tasks(400, ("a", "b"))
    curriculum = Curriculum(tasks, CurriculumConfig(domains={"a": 39}), seed=0)
    by_key = {task.key: task for task in tasks}
    count = sum(by_key[key].domain == "b" for iteration in range(1000) for key in curriculum.draw(iteration, 4))
    assert count == pytest.approx(1000 * 4 / 40, rel=0.25)


def test_online_evidence_replaces_the_offline_label():
    tasks = make_tasks(1)
    config = CurriculumConfig(offline_answers=8, online_decay=0.5)
    curriculum = Curriculum(tasks, config, seed=0, offline={"p0": 1.0})
    tiers = []
    for iteration in range(4):
        tiers.append(TIERS[curriculum.tiers()[0]])
        curriculum.observe(iteration, [answered("p0", 1)])
    # 8/8, then (4 + 1) / (4 + 8), (2.5 + 1) / (6 + 8), (1.75 + 1) / (7 + 8)
    assert tiers == ["very_easy", "medium", "hard", "hard"]
    assert curriculum.state_dict()["prompts"]["p0"][1:3] == [0.5 * 2.75 + 1, 0.5 * 15 + 8]


def test_prompts_that_stay_trivial_or_unsolvable_are_dropped():
    tasks = make_tasks(5)
    curriculum = Curriculum(tasks, CurriculumConfig(drop_trivial_after=2, drop_unsolvable_after=3, return_after=10), seed=0)
    wave = [
        answered("p0", 8),
        answered("p1", 0),
        answered("p2", 4),
        make_group([None] * 8, "p3"),
        make_group([1.0, None], "p4"),
    ]
    for iteration in range(3):
        curriculum.observe(iteration, [*wave, make_group([0.0, None], "p0"), make_group([1.0], "p1")])
    assert sorted(curriculum.draw(3, 3)) == ["p2", "p3", "p4"]
    report = curriculum.report()
    assert (report["dropped/trivial"], report["dropped/unsolvable"]) == (1, 1)
    assert sorted(curriculum.draw(11, 4)) == ["p0", "p2", "p3", "p4"]
    assert sorted(curriculum.draw(12, 5)) == ["p0", "p1", "p2", "p3", "p4"]


def test_a_visit_with_a_gradient_starts_the_count_anew():
    curriculum = Curriculum(make_tasks(2), CurriculumConfig(drop_trivial_after=2, drop_unsolvable_after=2), seed=0)
    for iteration, (first, second) in enumerate([(8, 0), (7, 8), (8, 0), (0, 8), (8, 7)]):
        curriculum.observe(iteration, [answered("p0", first), answered("p1", second)])
    assert len(set(curriculum.draw(5, 2))) == 2
    curriculum.observe(5, [make_group([0.2, 0.4, 0.9], "p0"), make_group([0.3, 0.31, 0.3], "p1")])
    curriculum.observe(6, [make_group([0.2, 0.4, 0.9], "p0"), make_group([0.3, 0.31, 0.3], "p1")])
    assert set(curriculum.draw(7, 1)) == {"p0"}, "p1: all wrong and no spread, twice"


def test_right_after_wrong_starts_a_count_of_its_own():
    curriculum = Curriculum(make_tasks(2), CurriculumConfig(drop_trivial_after=2, drop_unsolvable_after=2), seed=0)
    for iteration, (first, second) in enumerate([(0, 8), (8, 0), (8, 0)]):
        assert curriculum.report()["dropped/trivial"] == curriculum.report()["dropped/unsolvable"] == 0
        curriculum.observe(iteration, [answered("p0", first), answered("p1", second)])
    assert curriculum.report()["dropped/trivial"] == curriculum.report()["dropped/unsolvable"] == 1


def test_running_pass_rate_of_a_subcategory():
    curriculum = Curriculum(make_tasks(4, subcategories=("a", "b")), CurriculumConfig(subcategory_decay=0.75), seed=0)
    curriculum.observe(0, [answered("p0", 8), answered("p2", 4), make_group([None], "p1")])
    assert curriculum.state_dict()["subcategories"] == [["math", "a", 0.75]]
    curriculum.observe(1, [answered("p0", 2), answered("p1", 1)])
    assert curriculum.state_dict()["subcategories"] == [["math", "a", 0.75 * 0.75 + 0.25 * 0.25], ["math", "b", 0.125]]


def test_everything_dropped_is_one_clear_line():
    curriculum = Curriculum(make_tasks(1), CurriculumConfig(drop_trivial_after=1), seed=0)
    curriculum.observe(0, [answered("p0", 8)])
    with pytest.raises(CurriculumError, match="every prompt was dropped"):
        curriculum.draw(1, 1)


def test_switched_off_only_proportions_hold():
    tasks = make_tasks(200)
    config = CurriculumConfig(enabled=False, drop_trivial_after=1, target_weights=(0, 0, 1, 0, 0), tier_rate=1)
    curriculum = Curriculum(tasks, config, seed=0, offline=spread_rates(tasks))
    drawn = [key for iteration in range(4) for key in curriculum.draw(iteration, 50)]
    assert len(set(drawn)) == 200
    curriculum.observe(0, [answered("p0", 8)])
    assert len(set(curriculum.draw(4, 200))) == 200


def test_a_stop_anywhere_changes_nothing():
    tasks = make_tasks(90, ("math", "ocr"), ("a", "b", "c"))
    by_key, rates = {task.key: task for task in tasks}, spread_rates(tasks)
    config = CurriculumConfig(drop_trivial_after=1, drop_unsolvable_after=1, return_after=3)

    def run(stop_at: int | None) -> tuple[list[list[str]], str]:
        curriculum = Curriculum(tasks, config, seed=7, offline=rates)
        history = []
        for iteration in range(12):
            if iteration == stop_at:
                saved = json.dumps(curriculum.state_dict())
                curriculum = Curriculum(tasks, config, seed=7, offline=rates)
                curriculum.load_state_dict(json.loads(saved))
            keys = curriculum.draw(iteration, 17)
            history.append(keys)
            curriculum.observe(iteration, answer_all(keys, by_key, rates, iteration))
        return history, json.dumps(curriculum.state_dict())

    whole = run(None)
    for stop_at in range(12):
        assert run(stop_at) == whole


def test_draws_depend_on_seed_and_iteration():
    def first(seed: int, iteration: int) -> list[str]:
        return Curriculum(make_tasks(500), CurriculumConfig(), seed=seed).draw(iteration, 20)

    assert first(0, 0) == first(0, 0)
    assert first(0, 0) != first(1, 0)
    assert first(0, 0) != first(0, 1)


def test_the_first_draw_stays_the_same_in_every_version():
    drawn = Curriculum(make_tasks(50), CurriculumConfig(), seed=11).draw(0, 6)
    assert drawn == ["p35", "p43", "p3", "p23", "p22", "p44"]


def test_what_does_not_fit_is_named():
    tasks = make_tasks(4)
    with pytest.raises(CurriculumError, match="2 prompts with 1 different"):
        Curriculum([tasks[0], tasks[0]], CurriculumConfig(), seed=0)
    with pytest.raises(CurriculumError, match=r"'p1'.*1\.5"):
        Curriculum(tasks, CurriculumConfig(), seed=0, offline={"p1": 1.5})
    with pytest.raises(CurriculumError, match="'chess'"):
        Curriculum(tasks, CurriculumConfig(domains={"chess": 1}), seed=0)
    with pytest.raises(CurriculumError, match="'math/algebra'"):
        Curriculum(tasks, CurriculumConfig(subcategories={"math": {"algebra": 1}}), seed=0)
    with pytest.raises(CurriculumError, match="'stranger'"):
        Curriculum(tasks, CurriculumConfig(), seed=0).observe(0, [answered("stranger", 1)])
    full = Curriculum(tasks, CurriculumConfig(), seed=0)
    full.draw(0, 4)
    with pytest.raises(CurriculumError, match="'p3' and 0 more"):
        Curriculum(tasks[:3], CurriculumConfig(), seed=0).load_state_dict(full.state_dict())


@pytest.mark.parametrize(("key", "value"), [("tier_bounds", [0.1, 0.5, 0.5, 0.9]), ("target_weights", [0, 0, 0, 0, 0])])
def test_impossible_configurations_are_refused(key: str, value: list[float]):
    with pytest.raises(ConfigError, match=key):
        validate(CurriculumConfig, {key: value})
