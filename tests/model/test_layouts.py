"""The same loss and the same gradient in every layout.

Derivation of the gate: tensor, sequence and context parallelism only re-order fp32 sums, each with a relative error of about
1e-7; through 2 ViT and 8 decoder layers and their backward the worst parameter (the first one, the patch embedding) differs by
5e-6 in norm. A wrong reduction (a gradient not summed, or summed twice) differs by 0.5 or more. Pipeline and data parallelism
re-order only the sum over rows. The batch has packed rows, pictures of many shapes, a video, and a row without pictures. Every
layout leaves untrained tokens out behind the last attention; what they are held against does not.
Not covered: bf16, NCCL, and more than four ranks.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.model import layouts, oracle
from tests.ranks import run_ranks

FULL = {"text": "full", "vision": "full"}
SELECTIVE = {"text": "selective", "vision": "selective"}
LAYOUTS: list[layouts.Layout] = [
    ("tensor 2, sequence, data 2", {"tensor": 2}, {}),
    ("tensor 2, data 2", {"tensor": 2, "sequence": False}, {}),
    ("tensor 4 (more than key/value heads)", {"tensor": 4}, {}),
    ("pipeline 2, data 2", {"pipeline": 2}, {}),
    ("pipeline 2 x virtual 2, data 2", {"pipeline": 2, "virtual_pipeline": 2}, {}),
    ("pipeline 4", {"pipeline": 4}, {}),
    ("tensor 2 x pipeline 2", {"tensor": 2, "pipeline": 2}, {}),
    ("pipeline 2, 1 + 7 layers, tensor 2", {"tensor": 2, "pipeline": 2, "first_stage_layers": 1}, {}),
    ("pipeline 2 x virtual 2, 2 + 6 layers", {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 2}, {}),
    ("pipeline 4, 1 + 3 + 3 + 1 layers", {"pipeline": 4, "first_stage_layers": 1, "last_stage_layers": 1}, {}),
    ("pipeline 4, 0 + 3 + 3 + 2 layers", {"pipeline": 4, "first_stage_layers": 0, "last_stage_layers": 2}, {}),
    ("context 2, data 2", {"context": 2}, {}),
    ("context 4", {"context": 4}, {}),
    ("tensor 2 x context 2", {"tensor": 2, "context": 2}, {}),
    ("pipeline 2 x context 2", {"pipeline": 2, "context": 2}, {}),
    ("tensor 2, data 2, images dealt", {"tensor": 2, "vision": "images"}, {}),
    ("tensor 2 without sequence, images dealt", {"tensor": 2, "sequence": False, "vision": "images"}, {}),
    ("context 2, data 2, images dealt", {"context": 2, "vision": "images"}, {}),
    ("tensor 2 x context 2, images dealt", {"tensor": 2, "context": 2, "vision": "images"}, {}),
    ("tensor 2 x pipeline 2, images dealt", {"tensor": 2, "pipeline": 2, "vision": "images"}, FULL),
    ("data 4", {}, {}),
    ("tensor 2 x context 2, full recompute", {"tensor": 2, "context": 2}, FULL),
    ("data 4, no overlap", {"overlap": False}, {}),
    ("tensor 2, full recompute of both towers", {"tensor": 2}, FULL),
    ("pipeline 2, selective recompute of both towers", {"pipeline": 2}, SELECTIVE),
]


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("architecture")
    (folder / "config.json").write_text(json.dumps(oracle.hf_config("deep")))
    return str(folder)


@pytest.fixture(scope="module")
def results(architecture: str) -> dict[str, layouts.Result]:
    alone = run_ranks(layouts.losses_and_gradients, 1, "deep", architecture, [("one rank", {}, {})], True)[0]
    return alone | run_ranks(layouts.losses_and_gradients, 4, "deep", architecture, LAYOUTS, timeout_s=900)[0]


@pytest.mark.parametrize("name", [name for name, _, _ in LAYOUTS])
def test_loss_and_gradient_equal_one_rank(results: dict[str, layouts.Result], name: str) -> None:
    layouts.assert_same(results[name], results["one rank"])


def test_every_parameter_has_a_gradient(results: dict[str, layouts.Result]) -> None:
    """Otherwise equality would mean nothing."""
    _, _, reference = results["one rank"]
    assert len(reference) > 60
    assert all(float(gradient.norm()) > 0 for gradient in reference.values())


def test_first_weights_do_not_depend_on_the_layout(architecture: str) -> None:
    settings: list[dict[str, Any]] = [{}, {"tensor": 2, "pipeline": 2}, {"tensor": 4}, {"pipeline": 2, "virtual_pipeline": 2}]
    settings.append({"tensor": 2, "vision": "images"})
    reference, *others = run_ranks(layouts.first_weights, 4, architecture, settings)[0]
    assert all(float(weight.std()) > 0 for name, weight in reference.items() if weight.dim() > 1)
    for other in others:
        assert other.keys() == reference.keys()
        assert [name for name, weight in reference.items() if not weight.equal(other[name])] == []
