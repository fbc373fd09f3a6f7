"""The policy's gradient through Megatron: the same for any packing, number of micro-steps, data, tensor and pipeline layout.

One spawn of one rank and one of two; the reference is one answer a row on one rank, whose gradient is held to the objective
written in plain torch in `tests/rl/test_loss.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_glmv.config.base import validate
from megatron_glmv.config.rl import AlgorithmConfig
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.rl.batch import PolicyRow, PolicySample, build_row
from megatron_glmv.rl.loss import summarize
from tests.model import oracle
from tests.ranks import leave_layout, run_ranks

SHAPE = oracle.model_shape("digits")
ALGORITHM = AlgorithmConfig(clip_low=0.1, clip_high=0.2)
LENGTH = 256
GATE = 1e-5
"""Relative, in norm: the gate of tests/model/test_layouts.py, for the same reasons."""
WHOLE = 1e-6
"""Relative, of the gradient of all parameters as one vector."""
PACKINGS = {"one a row": [[0], [1], [2], [3]], "two a row": [[3, 0], [1, 2]], "all in one": [[2, 0, 3, 1], []]}
LAYOUTS = {
    1: {"one": {}},
    2: {
        "data 2": {},
        "tensor 2": {"tensor": 2},
        "pipeline 2": {"pipeline": 2},
        "context 2": {"context": 2},
        "images": {"tensor": 2, "vision": "images"},
    },
}


def samples() -> list[PolicySample]:
    """Four answers to three prompts, with pictures, inserted tokens and log-probabilities near those of the model."""
    rng = np.random.default_rng(5)
    found = []
    for number, name in enumerate(("text_only", "one_image", "video_frames", "one_image")):
        case = oracle.all_cases(SHAPE)[name]
        [document] = case.documents
        answer = rng.integers(30, 380, 7 + 3 * number)
        tokens = np.concatenate((document.tokens, answer)).astype(np.int64)
        trained = np.arange(len(tokens)) >= len(document.tokens)
        trained[len(document.tokens) + 2] = False  # an inserted token
        found.append(
            PolicySample(
                key=f"{name}#{number}",
                tokens=tokens,
                trained=trained,
                advantage=(1.3, -0.7, 0.4, -1.0)[number],
                engine_logprobs=np.where(trained, rng.normal(-6, 1, len(tokens)), 0).astype(np.float32),
                frames=tuple(document.frames),
                patches=case.patches if document.frames else None,
            )
        )
    return found


def rows_of(packing: list[list[int]]) -> list[PolicyRow]:
    answers = samples()
    tokens = SHAPE.tokens
    return [
        build_row([answers[i] for i in row], LENGTH, image_token=tokens.image, pad_token=tokens.pad, align=4) for row in packing
    ]


def gradients(rank: int) -> dict[str, Any]:
    """Gradient, norm and statistics of one update, by packing and layout."""
    from megatron_glmv.convert.hf_export import gather_hf_tensors
    from megatron_glmv.convert.hf_import import from_state_dict
    from megatron_glmv.parallel import groups
    from megatron_glmv.rl.update import old_logprobs, update_policy
    from megatron_glmv.training.assemble import assemble, assemble_model

    found = {}
    for layout, tree in LAYOUTS[groups.num_ranks()].items():
        config = validate(
            TrainConfig,
            {
                "run_folder": "unused",
                "steps": 1,
                "global_batch_rows": 2,
                "model": {"preset": "digits"},
                "parallel": {**tree, "distributed_optimizer": False, "overlap": False},
                "precision": {"dtype": "fp32", "layers": "torch"},
                "data": {"sequence_length": LENGTH, "sources": [{"name": "a", "path": "unused"}]},
                "optimizer": {"lr": 0.0},
            },
        )
        groups.initialize(config.parallel, config.seed)
        models = assemble_model(config)
        from_state_dict(models, oracle.random_model("digits").state_dict(), SHAPE)
        assembly = assemble(config, models)
        for name, packing in PACKINGS.items():
            own = rows_of(packing)[groups.data_rank() :: groups.data_size()]
            rows = old_logprobs(assembly, own, 1.0)
            # A policy that has moved on since, further at some tokens: a third of the ratios is clipped, above or not at all.
            shifts = [torch.where(row.row.labels % 3 == 0, 0.25, -0.05) for row in rows]
            rows = [
                PolicyRow(row.row, row.terms.with_old(row.terms.old_logprobs - shift))
                for row, shift in zip(rows, shifts, strict=True)
            ]
            result = update_policy(assembly, rows, 0, ALGORITHM, 1.0)
            weights = {k: v.clone() for k, v in gather_hf_tensors(assembly.chunks, SHAPE, lambda p: p.main_grad)}
            found[layout, name] = {"gradient": weights, "norm": result.grad_norm, "stats": summarize(result.stats)}
        leave_layout()
    return found


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], Any]:
    return run_ranks(gradients, 1, timeout_s=200)[0] | run_ranks(gradients, 2, timeout_s=200)[0]


CASES = [(layout, packing) for layouts in LAYOUTS.values() for layout in layouts for packing in PACKINGS]


@pytest.mark.parametrize(("layout", "packing"), CASES[1:])
def test_neither_packing_nor_layout_changes_the_gradient(found, layout: str, packing: str) -> None:
    reference, other = found["one", "one a row"], found[layout, packing]
    assert other["norm"] == pytest.approx(reference["norm"], rel=1e-5)
    largest = max(float(gradient.norm()) for gradient in reference["gradient"].values())
    for name, gradient in reference["gradient"].items():
        difference = float((other["gradient"][name] - gradient).norm())
        assert difference <= GATE * max(float(gradient.norm()), 1e-3 * largest), name
    for name, value in reference["stats"].items():
        assert other["stats"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(("layout", "packing"), [case for case in CASES[1:] if case[0] in ("one", "data 2")])
def test_the_whole_gradient_does_not_know_how_it_was_dealt(found, layout: str, packing: str) -> None:
    """Packing, micro-steps and data-parallel size; float32, so that only the order of sums differs."""
    reference, other = found["one", "one a row"]["gradient"], found[layout, packing]["gradient"]
    norm = sum(float(gradient.double().square().sum()) for gradient in reference.values()) ** 0.5
    difference = sum(float((other[name] - gradient).double().square().sum()) for name, gradient in reference.items()) ** 0.5
    assert difference <= WHOLE * norm


def test_the_statistics_are_those_of_the_batch(found) -> None:
    stats = found["one", "one a row"]["stats"]
    answers = samples()
    assert (stats["tokens"], stats["answers"]) == (sum(int(one.trained.sum()) for one in answers), len(answers))
    ratios = [float(torch.tensor(shift).exp()) for shift in (-0.05, 0.25)]
    assert ratios[0] < stats["ratio_mean"] < ratios[1] == pytest.approx(stats["ratio_max"], rel=1e-3)
    assert 0 < stats["clip_share_low"] + stats["clip_share_high"] < 1
