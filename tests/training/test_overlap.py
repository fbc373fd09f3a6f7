"""Weights that are gathered behind the next forward pass are whole wherever something else reads them.

Two replicas train three steps with and without overlapping; what they evaluate, save and would send to an engine is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_glmv.config.training import TrainConfig
from megatron_glmv.config.weight_map import entries
from megatron_glmv.convert.lora import open_weights
from megatron_glmv.training.state import TrainState
from tests.model import oracle
from tests.ranks import leave_layout, run_ranks

SHAPE = oracle.model_shape("digits")


def train_and_read(rank: int, folder: str) -> dict[bool, dict[str, Any]]:
    from megatron_glmv.convert.hf_export import gather_hf_tensors
    from megatron_glmv.convert.hf_import import from_state_dict
    from megatron_glmv.data.loader import StepRows
    from megatron_glmv.parallel import groups
    from megatron_glmv.sequence.packed import Document, pack
    from megatron_glmv.training.assemble import assemble, assemble_model
    from megatron_glmv.training.checkpoint import Checkpointer
    from megatron_glmv.training.optimizer import gather_weights
    from megatron_glmv.training.step import evaluate_step, train_step

    found = {}
    for overlap in (False, True):
        config = TrainConfig.model_validate({
            "run_folder": f"{folder}/{overlap}",
            "steps": 3,
            "global_batch_rows": 2,
            "model": {"preset": "digits"},
            "parallel": {"overlap": overlap},
            "precision": {"dtype": "fp32", "layers": "torch"},
            "data": {"sequence_length": 64, "sources": [{"name": "a", "path": "unused"}]},
            "optimizer": {"lr": 0.01},
        })  # fmt: skip
        groups.initialize(config.parallel, config.seed)
        models = assemble_model(config)
        from_state_dict(models, oracle.random_model("digits").state_dict(), SHAPE)
        assembly = assemble(config, models)
        random = np.random.default_rng(rank)
        tokens = random.integers(30, 380, 60).astype(np.int64)
        document = Document(tokens, np.ones(60, dtype=np.float32), (), "x")
        batch = StepRows((pack([document], 64, image_token=SHAPE.tokens.image, pad_token=SHAPE.tokens.pad),), ())
        for step in range(3):
            train_step(assembly, batch, step)
        loss, _ = evaluate_step(assembly, batch)
        train_step(assembly, batch, 0)
        Checkpointer(config, assembly.chunks, assembly.optimizer).save(TrainState(step=4))
        train_step(assembly, batch, 0)
        gather_weights(assembly.chunks)
        found[overlap] = {"loss": loss, "weights": {k: v.clone() for k, v in gather_hf_tensors(assembly.chunks, SHAPE)}}
        leave_layout()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[bool, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("overlap")
    return folder, run_ranks(train_and_read, 2, str(folder))[0]


def test_the_evaluation_sees_the_last_update(found) -> None:
    assert found[1][True]["loss"] == pytest.approx(found[1][False]["loss"], rel=1e-6)


def test_what_is_sent_has_the_last_update(found) -> None:
    for name, tensor in found[1][False]["weights"].items():
        torch.testing.assert_close(found[1][True]["weights"][name], tensor, rtol=1e-5, atol=1e-7, msg=name)


def test_what_is_saved_has_the_last_update(found) -> None:
    saved = {overlap: open_weights(found[0] / str(overlap) / "checkpoints/step_00000004", SHAPE) for overlap in (False, True)}
    for name in entries(SHAPE):
        torch.testing.assert_close(saved[True].read(name), saved[False].read(name), rtol=1e-5, atol=1e-7, msg=name)
