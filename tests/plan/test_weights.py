"""Bytes of weights, gradients and optimizer state, exact on every rank of many layouts, against what Megatron allocates."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_glmv.config.training import TrainConfig
from megatron_glmv.plan import weights
from tests.plan.states import weigh_all
from tests.ranks import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 2 x data 2": {"parallel": {"tensor": 2}},
    "tensor 2 x data 2, fp32": {"parallel": {"tensor": 2}, "precision": {"dtype": "fp32"}},
    "tensor 2 x data 2, whole optimizer": {"parallel": {"tensor": 2, "distributed_optimizer": False}},
    "whole optimizer, fp32": {"parallel": {"distributed_optimizer": False}, "precision": {"dtype": "fp32"}},
    "data 4": {"parallel": {}},
    "data 4, no overlap": {"parallel": {"overlap": False}},
    "tensor 4": {"parallel": {"tensor": 4, "sequence": False}},
    "context 2 x data 2": {"parallel": {"context": 2}},
    "pipeline 2, 1 + 3 layers, data 2": {"parallel": {"pipeline": 2, "first_stage_layers": 1}},
    "pipeline 4, 0 + 1 + 1 + 2 layers": {"parallel": {"pipeline": 4, "first_stage_layers": 0, "last_stage_layers": 2}},
    "pipeline 2 x virtual 2 x data 2": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
    "tensor 2 x pipeline 2": {"parallel": {"tensor": 2, "pipeline": 2}},
    "tensor 2 x context 2, frames dealt": {"parallel": {"tensor": 2, "context": 2, "vision": "images"}},
    "tensor 2 x pipeline 2, frames dealt": {"parallel": {"tensor": 2, "pipeline": 2, "vision": "images"}},
    "frozen vision tower": {"parallel": {"tensor": 2}, "model": {"freeze": ["vision", "merger"]}},
    "frozen decoder": {"parallel": {"pipeline": 2}, "model": {"freeze": ["text"]}},
    "adapters": {"parallel": {"tensor": 2, "pipeline": 2}, "model": {"lora": {"rank": 3, "targets": ["*"]}}},
    "some adapters, whole optimizer": {
        "parallel": {"tensor": 2, "distributed_optimizer": False},
        "model": {"lora": {"rank": 3, "targets": ["q_proj", "visual.*.attn.*", "down_proj", "merger.proj"]}},
    },
}


def tree(**changes: Any) -> dict[str, Any]:
    return {
        "run_folder": "unused",
        "steps": 2,
        "global_batch_rows": 4,
        "model": {"preset": "digits", **changes.get("model", {})},
        "parallel": changes["parallel"],
        "precision": {"layers": "torch", **changes.get("precision", {})},
        "data": {"sequence_length": 64, "sources": [{"name": "a", "path": "unused"}]},
    }


BUCKET = 100_000
"""Elements of a bucket where the small model is to have several; Megatron's own 40 million would be one."""
Ranks = list[tuple[list[dict[str, Any]], list[tuple[int, int]]]]


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    trees = [tree(**changes) for changes in (*LAYOUTS.values(), {"parallel": {}})]
    return run_ranks(weigh_all, 4, trees, BUCKET, timeout_s=400)


@pytest.fixture(scope="module")
def measured(ranks: Ranks) -> list[tuple[dict[str, Any], ...]]:
    """By layout, then rank."""
    return list(zip(*(states for states, _ in ranks), strict=True))


def test_buckets_end_where_megatrons_do(ranks: Ranks) -> None:
    config = TrainConfig.model_validate(tree(parallel={}))
    sizes = [parameter.elements for parameter in weights.chunk_parameters(config.model, config.parallel, 0)]
    buffer = weights.gradient_buffer(sizes, sharers=4, distributed=True, bucket_elements=BUCKET)
    assert len(buffer.buckets) > 3
    assert all(list(buffer.buckets) == buckets for _, buckets in ranks)
    assert sum(buffer.owned(rank, 4) for rank in range(4)) == sum(sizes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_is_exact_on_every_rank(measured: list[tuple[dict[str, Any], ...]], name: str) -> None:
    config = TrainConfig.model_validate(tree(**LAYOUTS[name]))
    for rank in measured[list(LAYOUTS).index(name)]:
        planned = weights.state_bytes(config, rank["data"], rank["stage"], rank["sharer"])
        assert (planned.weights, planned.gradients, planned.optimizer) == (
            rank["weights"],
            rank["gradients"],
            rank["optimizer"],
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_save_gathers_is_exact_on_every_rank(measured: list[tuple[dict[str, Any], ...]], name: str) -> None:
    config = TrainConfig.model_validate(tree(**LAYOUTS[name]))
    for rank in measured[list(LAYOUTS).index(name)]:
        assert weights.gathered_bytes(config, rank["data"], rank["stage"]) == rank["gathered"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_have_megatrons_names_sizes_and_order(measured: list[tuple[dict[str, Any], ...]], name: str) -> None:
    config = TrainConfig.model_validate(tree(**LAYOUTS[name]))
    for rank in measured[list(LAYOUTS).index(name)]:
        for chunk, shapes in enumerate(rank["shapes"]):
            planned = weights.chunk_parameters(config.model, config.parallel, rank["stage"], chunk)
            first = config.parallel.chunk_layers(config.model.shape.text.num_layers, rank["stage"], chunk).start
            assert [(_local(parameter.name, first), parameter.elements) for parameter in planned] == shapes


def _local(name: str, first: int) -> str:
    """A whole model's name as a chunk that begins with the layer `first` has it."""
    head, separator, tail = name.partition("language_model.decoder.layers.")
    number, _, rest = tail.partition(".")
    return f"{separator}{int(number) - first}.{rest}" if separator else head
