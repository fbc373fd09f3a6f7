"""Over-long thinking is closed once, and the rollout does not depend on how many tokens came at a time."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_glmv.rl.force_answer import ForceRule, Writing
from megatron_glmv.rl.types import Rollout

CLOSE, OPEN, STOP = 7, 8, 9
RULE = ForceRule(thinking_tokens=5, answer_tokens=3, end_of_think=(CLOSE,), answer_open=(OPEN,))


def write(script: list[int], rule: ForceRule | int, piece: int) -> Rollout:
    """An engine that samples the tokens of `script` in turn, at most `piece` in one call."""
    answer, at = Writing(rule), 0
    while answer.budget:
        size = min(piece, answer.budget, len(script) - at)
        tokens = script[at : at + size]
        if STOP in tokens:
            tokens = tokens[: tokens.index(STOP) + 1]
        before = len(answer.tokens)
        answer.add(tokens, [-0.5 - t / 10 for t in tokens], stopped=tokens[-1] == STOP)
        at += sum(not mark for mark in answer.inserted[before:])
    return answer.rollout("text", 3)


FULL = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("piece", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("script", "tokens", "inserted", "finish"),
    [
        # closed by force, then the answer stops by itself
        ([1, 2, 3, 4, 5, 6, STOP], [1, 2, 3, 4, 5, CLOSE, OPEN, 6, STOP], [5, 6], "stop"),
        # closed by force, then the answer's budget runs out
        (FULL, [1, 2, 3, 4, 5, CLOSE, OPEN, 6, 1, 2], [5, 6], "length"),
        # closed by the model, whose answer then has its own budget, of which the first piece may bring too much
        ([1, CLOSE, 2, 3, 4, 5, 6], [1, CLOSE, 2, 3, 4], [], "length"),
        ([1, CLOSE, OPEN, 2, STOP, 6], [1, CLOSE, OPEN, 2, STOP], [], "stop"),
        # closed by the model with the last token of the budget
        ([1, 2, 3, 4, CLOSE, OPEN, 2, STOP], [1, 2, 3, 4, CLOSE, OPEN, 2, STOP], [], "stop"),
        # a stop while thinking ends the answer, also with the last token of a budget
        ([1, 2, STOP, 4], [1, 2, STOP], [], "stop"),
        ([1, 2, 3, 4, STOP], [1, 2, 3, 4, STOP], [], "stop"),
        # a stop beyond the answer's budget was not sampled in it
        ([CLOSE, 1, 2, 3, STOP], [CLOSE, 1, 2, 3], [], "length"),
        # closing again within the answer gives no new budget
        ([1, CLOSE, 2, CLOSE, 3, 4], [1, CLOSE, 2, CLOSE, 3], [], "length"),
    ],
)
def test_rollouts(piece: int, script: list[int], tokens: list[int], inserted: list[int], finish: str):
    rollout = write(script, RULE, piece)
    assert rollout.tokens.tolist() == tokens
    assert np.flatnonzero(rollout.inserted).tolist() == inserted
    assert (rollout.logprobs[rollout.inserted] == 0).all()
    assert (rollout.logprobs[~rollout.inserted] < 0).all()
    assert (rollout.finish, rollout.weights_version) == (finish, 3)
    assert len(tokens) <= RULE.max_tokens


@pytest.mark.parametrize("piece", [1, 4])
def test_several_tokens_close_thinking(piece: int):
    rule = ForceRule(5, 2, (CLOSE, CLOSE + 10), ())
    assert write([1, CLOSE, 2, CLOSE, CLOSE + 10, 3, 4, 5], rule, piece).tokens.tolist() == [
        1,
        CLOSE,
        2,
        CLOSE,
        CLOSE + 10,
        3,
        4,
    ]
    assert write([1] * 9, rule, piece).tokens.tolist() == [1] * 5 + [CLOSE, CLOSE + 10, 1, 1]


@pytest.mark.parametrize("piece", [1, 4])
def test_without_a_rule_nothing_is_inserted(piece: int):
    rollout = write([1] * 9, 6, piece)
    assert (len(rollout.tokens), rollout.finish, rollout.inserted.any()) == (6, "length", False)


def test_an_engine_that_breaks_the_rules_is_refused():
    answer = Writing(RULE)
    with pytest.raises(ValueError, match="takes 5 more"):
        answer.add([1] * 6, [0.0] * 6)
    with pytest.raises(ValueError, match="log-probabilities"):
        answer.add([1], [])
    with pytest.raises(ValueError, match="not complete"):
        answer.rollout("")
    answer.add([1], [-0.1])
    answer.end("abort")
    assert (answer.rollout("").finish, answer.budget) == ("abort", 0)
    with pytest.raises(ValueError, match="takes 0 more"):
        answer.add([], [])


@pytest.mark.parametrize("arguments", [(0, 3, (1,)), (3, 0, (1,)), (3, 3, ())])
def test_impossible_rules_are_refused(arguments: tuple[int, int, tuple[int, ...]]):
    with pytest.raises(ValueError, match="needs both budgets"):
        ForceRule(*arguments)
