"""What the gates let through: shape, language, repetition. One row for every shape."""

from __future__ import annotations

import time
from typing import Any

import pytest

from megatron_glmv.config.rewards import FormatGate, Gates, RepetitionGate, RewardsConfig
from megatron_glmv.rl.rewards.extraction import Refused, extract
from megatron_glmv.rl.rewards.gates import longest_loop, pass_gates, repetition
from megatron_glmv.rl.rewards.worker import judge_response
from megatron_glmv.rl.types import Task

B, E = "<|begin_of_box|>", "<|end_of_box|>"
GOOD = f"<think>a</think><answer>so {B}42{E}.</answer>"
SHAPES = [
    (GOOD, {}, "one", "42"),
    (f"\n<think>a</think>\n\n<answer>{B} 42 {E}</answer>\n<|user|>", {}, "one", "42"),
    (GOOD + "<|endoftext|><|endoftext|>", {}, "one", "42"),
    (f"<think></think><answer>{B}{E}</answer>", {}, "one", ""),
    (GOOD, {"think": "opened"}, "one", "42"),
    (f"a</think><answer>{B}42{E}</answer>", {"think": "opened"}, "one", "42"),
    (f"a</think><answer>{B}42{E}</answer>", {}, "one", None),
    (f"<think>a</think>{B}42{E}", {"answer": "optional"}, "one", "42"),  # GLM-4.5V
    (f"{B}42{E}", {"think": "optional", "answer": "optional"}, "one", "42"),
    ("42", {"think": "optional", "answer": "optional"}, "optional", "42"),
    ("<think>a</think><answer>hello</answer>", {}, "none", "hello"),
    (GOOD, {}, "optional", "42"),
    (GOOD, {}, "none", None),  # box tokens where nothing is to be checked
    ("<think>a</think><answer>42</answer>", {}, "one", None),
    (f"<think>{B}42{E}</think><answer>42</answer>", {}, "one", None),
    (f"<think>{B}1{E}</think><answer>{B}42{E}</answer>", {}, "one", None),
    (f"<think>a</think><answer>{B}42{E}{B}43{E}</answer>", {}, "one", None),
    (f"<think>a</think><answer>{E}42{B}</answer>", {}, "one", None),
    (f"<think>a</think><answer>{B}{B}42{E}</answer>", {}, "one", None),
    (f"<think>a</think><answer>{B}42{E}", {}, "one", None),  # cut off
    ("<think>" + "a" * 100, {}, "one", None),
    (f"<think>a</think>text<answer>{B}42{E}</answer>", {}, "one", None),
    (f"<think>a</think><answer>{B}42{E}</answer>text", {}, "one", None),
    (f"<think>a<think>b</think><answer>{B}42{E}</answer>", {}, "one", None),
    (f"<think>a</think></think><answer>{B}42{E}</answer>", {}, "one", None),
    (f"<think>a</think><answer>x</answer><answer>{B}42{E}</answer>", {}, "one", None),
    (f"<answer>{B}42{E}</answer>", {}, "one", None),
    (f"<think>a</think><answer>{B}\\boxed{{42}}{E}</answer>", {}, "one", None),
    (f"<think>a</think><answer>{B}\\boxed{{42}}{E}</answer>", {"latex_box": True}, "one", "\\boxed{42}"),
    ("", {}, "one", None),
]


@pytest.mark.parametrize(("text", "gate", "box", "final"), SHAPES)
def test_shapes(text: str, gate: dict[str, Any], box: Any, final: str | None):
    settings = FormatGate(**gate, reward=-0.5)
    if final is not None:
        assert extract(text, settings, box).final == final
        return
    with pytest.raises(Refused) as refused:
        extract(text, settings, box)
    assert (refused.value.reason, refused.value.value) == ("format", -0.5)


CHINESE = (
    "今天我们来看这道题目首先需要仔细阅读题目的要求然后再一步一步地进行分析和计算最后得出正确的结论并且检查每一步是否有错误发生没有问题"
    * 2
)
ENGLISH = " ".join(f"word{'abcdefghij'[n % 10]}{'klmnopqrst'[n // 10 % 10]}{'uvwxyz'[n % 6]}" for n in range(260))


@pytest.mark.parametrize(
    ("thought", "answer", "refused"),
    [
        (CHINESE, "x", False),
        (ENGLISH, "x", False),
        (CHINESE + "\n" + ENGLISH, "x", True),
        ("x", ENGLISH + "\n" + CHINESE, True),
        (CHINESE, ENGLISH, False),  # a thought in one language and an answer in another
        (CHINESE + "\n" + " ".join(ENGLISH.split()[:150]), "x", False),
        ("The sign says " + CHINESE[:30] + "\n" + ENGLISH, "x", False),
    ],
)
def test_languages(thought: str, answer: str, refused: bool):
    text = f"<think>{thought}</think><answer>{B}1{E}{answer}</answer>"
    if not refused:
        assert pass_gates(text, Gates(), "one").final == "1"
        return
    with pytest.raises(Refused) as found:
        pass_gates(text, Gates(), "one")
    assert found.value.reason == "language"


FRESH = " ".join(f"{n * 7919 % 10007}" for n in range(2000))
OTHER = " ".join(f"{n * 7919 % 10007}" for n in range(2000, 6000))


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        (FRESH + OTHER, False),
        ("wait, let me check this again. " * 40, True),
        (FRESH + " so the answer is four . wait ," * 40 + OTHER, True),  # a loop in the middle of much else
        ("。" * 400, True),
        ("哈" * 400, True),
        ("a" * 10_000, True),
        ("no " * 50, False),  # short
        (FRESH[:3000] + " " + FRESH[:3000], False),  # half of it occurred before, and not more
        ((FRESH[:1500] + " ") * 4, True),
    ],
)
def test_repetition(text: str, repeats: bool):
    assert bool(repetition(text, RepetitionGate())) == repeats


def test_loops():
    assert longest_loop(["a", "b", "c"] * 50) == (3, 150)
    assert longest_loop(["x"] * 300) == (1, 300)
    assert longest_loop([str(n) for n in range(300)]) == (1, 0)


def test_a_reference_that_repeats_itself_may_be_repeated():
    config, table = RewardsConfig(), "0 | " * 300
    text = f"<think>I read.</think><answer>{B}{table}{E}</answer>"
    assert judge_response(Task("k", "ocr", "", table), text, config).value == 1.0
    assert judge_response(Task("k", "ocr", "", "0 |"), text, config).reason == "repetition"


def test_a_gate_can_be_switched_off_and_priced():
    text = f"<think>{'again and again ' * 200}</think><answer>{B}1{E}</answer>"
    config = RewardsConfig.model_validate({"gates": {"repetition": {"enabled": False}}})
    assert judge_response(Task("k", "math", "", "1"), text, config).value == 1.0
    config = RewardsConfig.model_validate({"gates": {"repetition": {"reward": -1}}})
    assert judge_response(Task("k", "math", "", "1"), text, config).value == -1.0


def test_box_tokens_in_an_open_answer_get_the_lowest_reward():
    config = RewardsConfig.model_validate({"gates": {"format": {"reward": -1}}})
    outcome = judge_response(Task("k", "general", "Write a poem.", None), GOOD, config)
    assert (outcome.value, outcome.reason) == (-1.0, "format")


def test_a_megabyte_is_refused_at_once():
    start = time.process_time()
    outcome = judge_response(Task("k", "math", "", "1"), "<think>" + "9" * 1_000_000, RewardsConfig())
    assert (outcome.value, outcome.reason) == (0.0, "limit")
    assert time.process_time() - start < 0.05


def test_a_long_thought_takes_no_time():
    text = f"<think>{FRESH * 30}</think><answer>{B}1{E}</answer>"[:390_000]
    start = time.process_time()
    judge_response(Task("k", "math", "", "1"), text, RewardsConfig())
    assert time.process_time() - start < 3
