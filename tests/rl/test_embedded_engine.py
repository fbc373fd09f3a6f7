"""The embedded engine samples from the policy that is trained: log-probabilities, forced answers, seeds, new weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_glmv.rl.engines.embedded import EmbeddedEngine
from megatron_glmv.rl.engines.engine import EngineError, Request, Sampling
from megatron_glmv.rl.force_answer import ForceRule
from megatron_glmv.rl.types import Prompt, Rollout, Task
from megatron_glmv.sequence.packed import Document, pack
from tests.model import oracle
from tests.ranks import run_ranks

SHAPE = oracle.model_shape("digits")
STOPS = SHAPE.tokens.eos
CASES = ("text_only", "several_images", "video_frames")


def sampling(**changes) -> Sampling:
    settings = {"temperature": 1.0, "top_p": 1.0, "stop_tokens": STOPS, "rule": 24, "text": lambda ids: " ".join(map(str, ids))}
    return Sampling(**(settings | changes))


def prompt(name: str) -> Prompt:
    case = oracle.all_cases(SHAPE)[name]
    [document] = case.documents
    tokens = np.asarray(document.tokens, dtype=np.int64)
    patches = case.patches if document.frames else None
    return Prompt(Task(name, "none", "", ""), tokens, tuple(document.frames), patches)


def engine(seed: int = 0, **changes) -> EmbeddedEngine:
    made = EmbeddedEngine(SHAPE, sampling(**changes), max_answers=7)
    made.update_weights(oracle.random_model("digits", seed).state_dict().items(), version=seed)
    return made


def answers(made: EmbeddedEngine, requests: list[Request]) -> list[list[Rollout]]:
    """To each request, in order."""
    found = dict(made.generate(requests))
    return [found[place] for place in range(len(requests))]


def trainer_logprobs(rank: int, seed: int, answered: list[tuple[Prompt, Rollout]]) -> list[np.ndarray]:
    """Of every answer's tokens under Megatron's model."""
    from megatron_glmv.config.parallel import ParallelConfig, PrecisionConfig, RecomputeConfig
    from megatron_glmv.convert.hf_import import from_state_dict
    from megatron_glmv.model.glm4v import build_model
    from megatron_glmv.model.inputs import make_inputs
    from megatron_glmv.parallel import groups

    layout = ParallelConfig(distributed_optimizer=False)
    groups.initialize(layout, seed=1)
    [model] = build_model(SHAPE, layout, PrecisionConfig(dtype="fp32", layers="torch"), RecomputeConfig())
    from_state_dict([model], oracle.random_model("digits", seed).state_dict(), SHAPE)
    found = []
    for asked, rollout in answered:
        tokens = np.concatenate((asked.tokens, rollout.tokens))
        document = Document(tokens, np.ones(len(tokens), dtype=np.float32), asked.frames, "x")
        row = pack([document], len(tokens), image_token=SHAPE.tokens.image, pad_token=SHAPE.tokens.pad, patches=asked.patches)
        with torch.no_grad():
            losses = model(make_inputs(row, SHAPE, torch.device("cpu")))[0]
        found.append(-losses[len(asked.tokens) - 1 : len(tokens) - 1].numpy())
    return found


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
    made = engine()
    asked = prompt("several_images")
    together = answers(made, [Request(prompt("text_only"), 6, seed=1), Request(asked, 5, seed=2)])[1]
    alone = answers(made, [Request(asked, 5, seed=2)])[0]
    other = answers(made, [Request(asked, 5, seed=3)])[0]
    assert [one.tokens.tolist() for one in together] == [one.tokens.tolist() for one in alone]
    assert [one.tokens.tolist() for one in other] != [one.tokens.tolist() for one in alone]
    assert len({tuple(one.tokens) for one in alone}) == 5


def test_answers_end_with_a_stop_or_at_their_length() -> None:
    for rollout in answers(engine(rule=40, temperature=2.0), [Request(prompt("text_only"), 40, seed=1)])[0]:
        stops = np.isin(rollout.tokens, STOPS)
        if rollout.finish == "stop":
            assert stops.tolist() == [False] * (len(stops) - 1) + [True]
        else:
            assert rollout.finish in ("length", "abort") and not stops.any()
            assert (len(rollout.tokens) == 40) == (rollout.finish == "length")


def test_sampling_follows_the_softmax() -> None:
    """20,000 first tokens against the chances of the likeliest ones."""
    made = EmbeddedEngine(SHAPE, sampling(rule=1), max_answers=20_000)
    model = oracle.random_model("digits")
    made.update_weights(model.state_dict().items(), version=0)
    asked = prompt("text_only")
    given = answers(made, [Request(asked, 20_000, seed=5)])[0]
    drawn = np.array([one.tokens[0] for one in given if one.finish != "abort"])
    with torch.no_grad():
        chances = model(input_ids=torch.from_numpy(asked.tokens)[None]).logits[0, -1].softmax(-1).numpy()
    likely = np.argsort(chances)[-20:]
    counts = np.bincount(drawn, minlength=len(chances))[likely]
    expected = 20_000 * chances[likely]
    assert (np.abs(counts - expected) / np.sqrt(expected)).max() < 4


def test_a_nucleus_leaves_the_tail_out() -> None:
    model = oracle.random_model("digits")
    asked = prompt("text_only")
    with torch.no_grad():
        chances = model(input_ids=torch.from_numpy(asked.tokens)[None]).logits[0, -1].softmax(-1)
    ordered, order = chances.sort(descending=True)
    allowed = set(order[: int((ordered.cumsum(0) < 0.5).sum()) + 1].tolist())
    drawn = {int(one.tokens[0]) for one in answers(engine(rule=1, top_p=0.5), [Request(asked, 200, seed=5)])[0]}
    assert drawn <= allowed and len(drawn) > 3


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
