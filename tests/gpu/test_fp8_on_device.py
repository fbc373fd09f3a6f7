"""FP8 against bf16 on one device: every recipe trains a small language as bf16 does, and its copies of weights are fresh."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_glmv.parallel.mcore import hardware
from tests.gpu import runs
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
STEPS = 200
RECIPES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "delayed": {"fp8_text": "delayed", "fp8_vision": "delayed"},
    "current": {"fp8_text": "current", "fp8_vision": "current"},
    "block": {"fp8_text": "block", "fp8_vision": "block"},
    "current with bf16 ends": {"fp8_text": "current", "bf16_ends_text": (1, 1), "fp8_vision": "current"},
}


def loss_curves(rank: int, folder: str, variants: dict[str, dict[str, Any]], steps: int) -> dict[str, list[float]]:
    """Losses of the same rows from the same weights under each precision."""
    settings = {name: runs.config(folder, lr=2e-3, **fields) for name, fields in variants.items()}
    if runs.on_gpu():
        assert hardware().has_te
    return runs.in_turn(lambda assembly: runs.train_language(assembly, steps), settings)


def fresh_copies(rank: int, folder: str, fields: dict[str, Any]) -> tuple[float, float]:
    """How the pictures' features differ between a model that has trained and a new one with its weights; and from the start."""
    settings = runs.config(folder, lr=1e-2, **fields)
    row = runs.language_rows(0, 1, settings.sequence_length)[0]
    assembly = runs.build(settings)
    [model] = assembly.models
    start = runs.features(settings, model, row)
    runs.train_language(assembly, 3)
    model.set_is_first_microbatch()
    trained = runs.features(settings, model, row)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    runs.groups.parallel_state.destroy_model_parallel()
    [other] = runs.build(settings).models
    assert not other.load_state_dict(weights, strict=False).unexpected_keys
    again = runs.features(settings, other, row)
    return runs.distance(trained, again), runs.distance(trained, start)


def test_200_steps_within_1_percent_of_bf16(tmp_path: Any) -> None:
    """Means of 20 losses: single ones scatter more by their rows than FP8 moves them, but all runs see the same rows."""
    curves = run_ranks(loss_curves, 1, str(tmp_path), RECIPES, STEPS, timeout_s=550.0)[0]
    reference = runs.windows(curves["bf16"])
    assert reference[-1] < 0.6 * reference[0]
    for name, losses in curves.items():
        apart = np.abs(runs.windows(losses) / reference - 1)
        assert np.isfinite(losses).all(), name
        assert apart.max() <= 0.01, (name, apart)


@pytest.mark.parametrize("recipe", ["current", "block"])
def test_a_towers_weights_are_quantized_anew_each_step_though_the_decoder_is_in_bf16(recipe: str, tmp_path: Any) -> None:
    stale, moved = run_ranks(fresh_copies, 1, str(tmp_path), {"fp8_vision": recipe}, timeout_s=300.0)[0]
    assert moved > 0.01
    assert stale == 0
