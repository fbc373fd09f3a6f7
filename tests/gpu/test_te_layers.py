"""Transformer Engine's layers against the plain torch ones, on one CUDA device.

bf16 rounds differently in fused kernels, so neither is compared with the other alone: the te spec may be no further from the
fp32 logits than 1.5 times the torch spec's own distance in bf16. FP8 is judged by the loss of a short training.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_glmv.config.parallel import ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_glmv.convert.hf_import import from_state_dict
from megatron_glmv.model.glm4v import build_model
from megatron_glmv.model.inputs import make_inputs
from megatron_glmv.parallel import groups, platform
from tests.model import oracle
from tests.model.layouts import make_rows
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LAYOUT = ParallelConfig(distributed_optimizer=False)


def _build(shape: Any, weights: dict[str, torch.Tensor], **precision: Any) -> Any:
    [model] = build_model(shape, LAYOUT, PrecisionConfig(**precision), RecomputeConfig())
    from_state_dict([model], weights, shape)
    return model


def logits_of_specs(rank: int) -> dict[str, torch.Tensor]:
    """Logits of the first row under each spec and precision, and the parameter names of both."""
    groups.initialize(LAYOUT, seed=1)
    shape, weights = oracle.model_shape("digits"), oracle.random_model("digits").state_dict()
    found: dict[str, Any] = {}
    for name, precision in {
        "fp32": {"dtype": "fp32", "layers": "torch"},
        "torch": {"dtype": "bf16", "layers": "torch"},
        "te": {"dtype": "bf16", "layers": "te"},
    }.items():
        model = _build(shape, weights, **precision)
        inputs = make_inputs(make_rows(shape)[0], shape, platform.device())
        with torch.no_grad():
            found[name] = model(inputs, return_logits=True).float().cpu()
        found[f"{name} names"] = sorted(key for key, _ in model.named_parameters())
    return found


def fp8_losses(rank: int, recipe: str, steps: int) -> tuple[list[float], list[float]]:
    """Losses of a short training in bf16 and in FP8, on the same rows from the same weights."""
    groups.initialize(LAYOUT, seed=1)
    shape, weights = oracle.model_shape("digits"), oracle.random_model("digits").state_dict()
    curves = []
    for fp8 in ("off", recipe):
        model = _build(shape, weights, dtype="bf16", layers="te", fp8_text=fp8, fp8_vision=fp8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        inputs = make_inputs(make_rows(shape)[0], shape, platform.device(), merged_multiple=16)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(inputs) * inputs.loss_weights).sum() / (inputs.loss_weights > 0).sum()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        curves.append(losses)
    return curves[0], curves[1]


def test_te_equals_torch_in_bf16_and_names() -> None:
    found = run_ranks(logits_of_specs, 1)[0]
    assert found["te names"] == found["torch names"]
    torch_distance = float((found["torch"] - found["fp32"]).abs().mean())
    assert float((found["te"] - found["fp32"]).abs().mean()) <= 1.5 * torch_distance


@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
def test_fp8_trains_like_bf16(recipe: str) -> None:
    bf16, fp8 = run_ranks(fp8_losses, 1, recipe, 30)[0]
    assert fp8[-1] < 0.7 * fp8[0]
    assert fp8[-1] == pytest.approx(bf16[-1], rel=0.1)
