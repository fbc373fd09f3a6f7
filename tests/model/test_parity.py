"""The same function as transformers: logits and gradients on random weights, and rows that do not leak.

Gates: fp32 noise inside the vision path is 3e-5 to 8e-5 of a logit of standard deviation 1.4 (measured here: 4e-5), the
smallest real bug seen on ordinary weights (tanh instead of erf GELU) 3e-3; hence 3e-4. Gradients: measured 6e-6 relative.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_glmv.config.parallel import ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_glmv.convert import mapping
from megatron_glmv.convert.hf_import import from_state_dict
from megatron_glmv.sequence.packed import PackedSequence, pack
from tests.model import oracle
from tests.ranks import run_ranks

LAYOUT = ParallelConfig(distributed_optimizer=False)
FP32 = PrecisionConfig(dtype="fp32", layers="torch")
PROBE = "epsilon probe"


def _row(case: oracle.Case, shape: Any) -> PackedSequence:
    tokens = sum(len(document.tokens) for document in case.documents)
    special = shape.tokens
    return pack(
        case.documents, tokens + 5, image_token=special.image, pad_token=special.pad, patches=case.patches, key=case.name
    )


def _build(shape: Any, weights: dict[str, torch.Tensor]) -> Any:
    from megatron_glmv.model.glm4v import build_model

    [model] = build_model(shape, LAYOUT, FP32, RecomputeConfig())
    from_state_dict([model], weights, shape)
    return model


def _compare(model: Any, hf: Any, shape: Any, case: oracle.Case) -> dict[str, Any]:
    """Worst differences of one case: logits, losses of the packed row against its documents, gradients."""
    from megatron_glmv.model.inputs import make_inputs

    device = torch.device("cpu")
    row = _row(case, shape)
    inputs = make_inputs(row, shape, device)
    with torch.no_grad():
        logits = model(inputs, return_logits=True)[:, 0]
    spans = [(start, end) for _, start, end in row.documents]
    references = oracle.case_logits(hf, case)
    worst = max(float((logits[a:b] - ref).abs().max()) for (a, b), ref in zip(spans, references, strict=True))

    losses = model(inputs)[0]
    leak, start = 0.0, 0
    for document, (a, b) in zip(case.documents, spans, strict=True):
        count = sum(rows * columns for rows, columns in document.frames)
        alone = replace(case, documents=[document], patches=case.patches[start : start + count])
        start += count
        with torch.no_grad():
            leak = max(
                leak, float((model(make_inputs(_row(alone, shape), shape, device))[0, : b - a] - losses[a:b]).abs().max())
            )

    model.zero_grad()
    (losses * inputs.loss_weights[0]).sum().backward()
    total, gradients = oracle.case_gradients(hf, case)
    own: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        own |= mapping.to_hf(name, parameter.grad, shape)
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    relative = {
        name: float((own[name] - gradient).norm()) / max(float(gradient.norm()), 1e-6 * largest)
        for name, gradient in gradients.items()
    }
    name = max(relative, key=relative.__getitem__)
    return {
        "logits": worst,
        "leak": leak,
        "gradient": relative[name],
        "of": name,
        "loss": abs(float(losses.detach() @ inputs.loss_weights[0]) - total) / total,
    }


def compare_all(rank: int) -> dict[tuple[str, str], dict[str, Any]]:
    from megatron_glmv.parallel import groups

    groups.initialize(LAYOUT, seed=1)
    results = {}
    for variant in oracle.VARIANTS:
        hf, shape = oracle.random_model(variant), oracle.model_shape(variant)
        model = _build(shape, hf.state_dict())
        for name, case in oracle.all_cases(shape).items():
            results[variant, name] = _compare(model, hf, shape, case)
    hf, shape = oracle.random_model("digits", epsilon_probe=True), oracle.model_shape("digits")
    case = oracle.all_cases(shape)["several_images"]
    results[PROBE, "right"] = _compare(_build(shape, hf.state_dict()), hf, shape, case)
    for part in ("text", "vision"):
        wrong = shape.model_copy(update={part: getattr(shape, part).model_copy(update={"norm_epsilon": 1e-6})})
        results[PROBE, f"wrong in {part}"] = _compare(_build(wrong, hf.state_dict()), hf, shape, case)
    return results


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, str], dict[str, Any]]:
    return run_ranks(compare_all, 1, timeout_s=300)[0]


@pytest.mark.parametrize("variant", oracle.VARIANTS)
@pytest.mark.parametrize("case", oracle.SCRIPTS)
def test_equals_transformers(results: dict[tuple[str, str], dict[str, Any]], variant: str, case: str) -> None:
    found = results[variant, case]
    assert found["logits"] <= 3e-4
    assert found["loss"] <= 1e-5
    assert found["gradient"] <= 1e-4, f"gradient of {found['of']}"


@pytest.mark.parametrize("variant", oracle.VARIANTS)
@pytest.mark.parametrize("case", ["two_documents", "mixed_documents"])
def test_rows_do_not_leak(results: dict[tuple[str, str], dict[str, Any]], variant: str, case: str) -> None:
    assert results[variant, case]["leak"] <= 1e-5


def test_epsilon_probe_sees_a_wrong_epsilon(results: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert results[PROBE, "right"]["logits"] <= 3e-4
    assert results[PROBE, "wrong in text"]["logits"] > 0.1
    assert results[PROBE, "wrong in vision"]["logits"] > 0.1
