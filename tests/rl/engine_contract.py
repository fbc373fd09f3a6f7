"""What every rollout engine must hold to, whatever runs behind it; `make` gives an engine with the weights of seed 0.

Log-probabilities are held to transformers, and to Megatron's model, which is what the trainer computes with.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from transformers import Glm4vForConditionalGeneration

from megatron_glmv.rl.engines.engine import Engine, Request, Sampling
from megatron_glmv.rl.types import Prompt, Rollout
from megatron_glmv.sequence.packed import Document, pack
from megatron_glmv.sequence.patches import normalize_patches
from tests.model import oracle

SHAPE = oracle.model_shape("digits")
STOPS = SHAPE.tokens.eos
Make = Callable[..., Engine]


def sampling(**changes) -> Sampling:
    settings = {"temperature": 1.0, "top_p": 1.0, "stop_tokens": STOPS, "rule": 24, "text": lambda ids: " ".join(map(str, ids))}
    return Sampling(**(settings | changes))


def answers(made: Engine, requests: list[Request]) -> list[list[Rollout]]:
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


def reference_logprobs(model: Glm4vForConditionalGeneration, asked: Prompt, rollout: Rollout, temperature: float) -> np.ndarray:
    """Of an answer's tokens under transformers' model; the prompt has no pictures, pictures only, or one video only."""
    ids = torch.from_numpy(np.concatenate((asked.tokens, rollout.tokens)))[None]
    patches = grids = None
    video = bool(asked.files) and asked.files[0].kind == "video"
    if asked.patches is not None:
        patches = normalize_patches(asked.patches, torch.float32)
        grids = torch.tensor([(1, *frame) for frame in asked.frames])
        if video:
            grids = torch.tensor([(len(asked.frames), *asked.frames[0])])
    types = oracle.token_types(ids, SHAPE)
    # An answer may begin a picture and write none; only what the prompt holds has features.
    types[0, len(asked.tokens) :] = 0
    inputs = oracle.DocumentInputs(ids, types, *((None, None, patches, grids) if video else (patches, grids, None, None)))
    with torch.no_grad():
        logprobs = torch.log_softmax(oracle.document_logits(model, inputs) / temperature, dim=-1)
    start = len(asked.tokens) - 1
    return logprobs[start:-1].gather(1, ids[0, start + 1 :, None])[:, 0].numpy()


def worst_gap(rollout: Rollout, logprobs: np.ndarray) -> float:
    """Largest difference over the tokens that were sampled."""
    sampled = ~rollout.inserted
    return float(np.abs(rollout.logprobs - logprobs)[sampled].max(initial=0.0))


def check_seeds(make: Make, asked: Prompt, other: Prompt) -> None:
    """Answers depend on the request and its seed, and not on what is sampled beside them."""
    made = make()
    together = answers(made, [Request(other, 6, seed=1), Request(asked, 5, seed=2)])[1]
    alone = answers(made, [Request(asked, 5, seed=2)])[0]
    changed = answers(made, [Request(asked, 5, seed=3)])[0]
    assert [one.tokens.tolist() for one in together] == [one.tokens.tolist() for one in alone]
    assert [one.tokens.tolist() for one in changed] != [one.tokens.tolist() for one in alone]
    assert len({tuple(one.tokens) for one in alone}) == 5


def check_endings(make: Make, asked: Prompt) -> None:
    """An answer ends with its first stop token, at its length, or before a token that stands for pixels."""
    endings = set()
    for rollout in answers(make(rule=40, temperature=2.0), [Request(asked, 40, seed=1)])[0]:
        stops = np.isin(rollout.tokens, STOPS)
        endings.add(rollout.finish)
        assert not np.isin(rollout.tokens, (SHAPE.tokens.image, SHAPE.tokens.video)).any()
        if rollout.finish == "stop":
            assert stops.tolist() == [False] * (len(stops) - 1) + [True]
        else:
            assert rollout.finish in ("length", "abort") and not stops.any()
            assert (len(rollout.tokens) == 40) == (rollout.finish == "length")
    assert endings == {"stop", "length", "abort"}


def first_chances(asked: Prompt) -> torch.Tensor:
    """Of the token after a prompt of text."""
    with torch.no_grad():
        logits = oracle.random_model("digits")(input_ids=torch.from_numpy(asked.tokens)[None]).logits
    return logits[0, -1].softmax(-1)


def check_softmax(make: Make, asked: Prompt, number: int) -> None:
    """First tokens against the chances of the likeliest ones."""
    given = answers(make(rule=1), [Request(asked, number, seed=5)])[0]
    drawn = np.array([one.tokens[0] for one in given if one.finish != "abort"])
    chances = first_chances(asked).numpy()
    likely = np.argsort(chances)[-20:]
    counts = np.bincount(drawn, minlength=len(chances))[likely]
    expected = number * chances[likely]
    assert len(given) == number
    assert (np.abs(counts - expected) / np.sqrt(expected)).max() < 4


def check_nucleus(make: Make, asked: Prompt) -> None:
    """Nothing is drawn from outside of the nucleus."""
    ordered, order = first_chances(asked).sort(descending=True)
    allowed = set(order[: int((ordered.cumsum(0) < 0.5).sum()) + 1].tolist())
    drawn = {int(one.tokens[0]) for one in answers(make(rule=1, top_p=0.5), [Request(asked, 200, seed=5)])[0]}
    assert drawn <= allowed and len(drawn) > 3
