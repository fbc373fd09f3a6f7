"""The embedded engine samples from the policy that is trained: log-probabilities, forced answers, seeds, new weights."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from megatron_glmv.rl.engines.embedded import EmbeddedEngine, pick_tokens
from megatron_glmv.rl.engines.engine import EngineError, Request
from megatron_glmv.rl.force_answer import ForceRule
from megatron_glmv.rl.types import Prompt, Rollout, Task
from tests.model import oracle
from tests.ranks import run_ranks
from tests.rl import engine_contract
from tests.rl.engine_contract import SHAPE, answers, sampling, trainer_logprobs

CASES = ("text_only", "several_images", "video_frames")


def prompt(name: str) -> Prompt:
    case = oracle.all_cases(SHAPE)[name]
    [document] = case.documents
    tokens = np.asarray(document.tokens, dtype=np.int64)
    patches = case.patches if document.frames else None
    return Prompt(Task(name, "none", "", ""), tokens, tuple(document.frames), patches)


def engine(seed: int = 0, max_answers: int = 7, **changes) -> EmbeddedEngine:
    made = EmbeddedEngine(SHAPE, sampling(**changes), max_answers=max_answers)
    made.update_weights(oracle.random_model("digits", seed).state_dict().items(), version=seed)
    return made


@pytest.fixture(scope="module")
def answered() -> dict[int, list[tuple[Prompt, Rollout]]]:
    """Answers before and after a change of weights, forced ones among them."""
    rule = ForceRule(thinking_tokens=9, answer_tokens=5, end_of_think=(40, 41), answer_open=(42,))
    made = engine(rule=rule)
    found = {}
    for seed in (0, 4):
        made.update_weights(oracle.random_model("digits", seed).state_dict().items(), version=seed)
        prompts = [prompt(name) for name in CASES]
        rollouts = answers(made, [Request(one, 4, seed=7) for one in prompts])
        found[seed] = [(one, rollout) for one, group in zip(prompts, rollouts, strict=True) for rollout in group]
    return {seed: [(one, rollout) for one, rollout in pairs if len(rollout.tokens)] for seed, pairs in found.items()}


@pytest.mark.parametrize("seed", [0, 4])
def test_the_trainer_gives_the_same_log_probabilities(answered, seed: int) -> None:
    reference = run_ranks(trainer_logprobs, 1, seed, answered[seed])[0]
    assert any(rollout.inserted.any() for _, rollout in answered[seed])
    for (_, rollout), logprobs in zip(answered[seed], reference, strict=True):
        sampled = ~rollout.inserted
        assert rollout.weights_version == seed and SHAPE.tokens.image not in rollout.tokens
        assert np.abs(rollout.logprobs - logprobs)[sampled].max() <= 1e-4  # measured 1e-5; the issue asks for 1e-3
        assert (rollout.logprobs[~sampled] == 0).all()


def test_answers_depend_on_the_seed_and_not_on_the_batch() -> None:
    engine_contract.check_seeds(engine, prompt("several_images"), prompt("text_only"))


def test_answers_end_with_a_stop_or_at_their_length() -> None:
    engine_contract.check_endings(engine, prompt("text_only"))


def test_sampling_follows_the_softmax() -> None:
    engine_contract.check_softmax(partial(engine, max_answers=20_000), prompt("text_only"), 20_000)


def test_a_nucleus_leaves_the_tail_out() -> None:
    engine_contract.check_nucleus(engine, prompt("text_only"))


@pytest.mark.parametrize("total", [0.5, 0.75, 0.99999994, 1.0, 1.0000001])
def test_the_largest_draw_is_no_token_without_a_chance(total: float) -> None:
    sums = torch.tensor([[0.25, 0.5 * total, total, total, total]])
    largest = float(np.nextafter(1.0, 0.0))
    assert [pick_tokens(sums, [draw]).item() for draw in (0.0, largest)] == [0, 2]


def test_a_rank_that_missed_an_update_says_so() -> None:
    made = engine(4)
    assert made.weights_on_every_rank
    made.expect_version(4)
    with pytest.raises(EngineError, match="has weights 4 and not 5"):
        made.expect_version(5)


def test_weights_that_do_not_come_whole_are_refused() -> None:
    made = engine()
    weights = dict(oracle.random_model("digits").state_dict())
    with pytest.raises(EngineError, match=r"no tensor model\.extra of \[2\]"):
        made.update_weights([("model.extra", torch.zeros(2))], version=1)
    with pytest.raises(EngineError, match="no complete weights"):
        answers(made, [Request(prompt("text_only"), 1, seed=0)])
    weights.pop("lm_head.weight")
    with pytest.raises(EngineError, match=r"lack lm_head\.weight"):
        made.update_weights(weights.items(), version=1)
