"""Bytes that a forward pass keeps, against what autograd really keeps on the torch spec, in several layouts and recomputations.

Derivation of the gate: the count leaves out indexes and masks (8 to 60 bytes a token or patch) and, with frozen parts and
adapters, what passes through without a weight to learn; the worst case measured stands at each group. A tower, a tensor of a
layer or a factor of the tensor ranks that is forgotten makes 5 % or more.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.plan.activations import most_going_on, row_bytes
from megatron_glmv.sequence.cost import deal_frames
from megatron_glmv.sequence.packed import PackedSequence
from tests.model import layouts, oracle
from tests.plan.kept import keep_all
from tests.ranks import run_ranks

FULL, SELECTIVE = {"text": "full", "vision": "full"}, {"text": "selective", "vision": "selective"}
CASES: dict[str, dict[str, Any]] = {
    "tensor 2": {"parallel": {"tensor": 2}},
    "tensor 2, whole activations": {"parallel": {"tensor": 2, "sequence": False}},
    "tensor 2, fp32": {"parallel": {"tensor": 2}, "precision": {"dtype": "fp32"}},
    "data 2": {},
    "context 2": {"parallel": {"context": 2}},
    "context 2, frames dealt": {"parallel": {"context": 2, "vision": "images"}},
    "tensor 2, frames dealt": {"parallel": {"tensor": 2, "vision": "images"}},
    "selective": {"parallel": {"tensor": 2}, "recompute": SELECTIVE},
    "full": {"parallel": {"tensor": 2}, "recompute": FULL},
    "full of the vision tower alone": {"recompute": {"vision": "full"}},
    "frozen tower": {"model": {"freeze": ["vision"]}},
    "frozen tower and merger": {"model": {"freeze": ["vision", "merger"]}},
}
WORST = {"context 2": 0.05, "context 2, frames dealt": 0.05}
"""Gates of cases that are counted more coarsely; the others' is 0.02."""


def tree(folder: str, **changes: Any) -> dict[str, Any]:
    base = layouts.train_config(folder, changes.get("parallel", {}), changes.get("recompute", {})).model_dump()
    base["precision"] |= {"dtype": "bf16", **changes.get("precision", {})}
    base["model"] |= changes.get("model", {}) | {"load_weights": False}
    base["parallel"]["distributed_optimizer"] = True
    return base


Measured = dict[str, tuple[TrainConfig, list[list[tuple[int, int]]]]]
"""Configuration, and for each rank and row bytes that are kept and tokens that have a loss."""


def make_rows(shape: ModelShape) -> list[PackedSequence]:
    """Rows of which 5 to 40 % are trained, and one of which all is."""
    rows = layouts.make_rows(shape)
    return [*rows, dataclasses.replace(rows[0], loss_weights=torch.ones(layouts.LENGTH), key="all trained")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("architecture")
    (folder / "config.json").write_text(json.dumps(oracle.hf_config("digits")))
    trees = [tree(str(folder), **changes) for changes in CASES.values()]
    rows = [dataclasses.replace(row, patches=pixels(row.patches)) for row in make_rows(oracle.model_shape("digits"))]
    found = run_ranks(keep_all, 2, trees, rows, timeout_s=300)
    return {
        name: (TrainConfig.model_validate(tree), [ranks[number] for ranks in found])
        for number, (name, tree) in enumerate(zip(CASES, trees, strict=True))
    }


def pixels(patches: Tensor | None) -> Tensor | None:
    """Patches as they come from the decoder; normalised ones would be kept without a copy in fp32."""
    return None if patches is None else (patches * 50 + 128).clamp(0, 255).to(torch.uint8)


def predicted(config: TrainConfig, patches: int, going_on: int) -> float:
    """Bytes of a row on the one stage of a layout without pipeline."""
    row = row_bytes(config, patches, "torch", going_on)
    layers = (config.model.shape.text.num_layers - 1) * row.text + row.last
    return row.vision + row.merger + row.entry[0] + layers + row.head


@pytest.mark.parametrize("name", CASES)
def test_kept_bytes(measured: Measured, name: str) -> None:
    config, ranks = measured[name]
    rows = make_rows(config.model.shape)
    for number, rank in enumerate(ranks):
        for row, (found, losses) in zip(rows, rank, strict=True):
            patches = encoded_patches(config, row, number)
            error = predicted(config, patches, losses) / found - 1
            print(f"{name}: {row.key}, {patches} patches, {losses} losses: {found} kept, {error:+.1%}")
            assert abs(error) <= WORST.get(name, 0.02), f"{row.key}: {error:+.1%} of {found} bytes"


@pytest.mark.parametrize("name", CASES)
def test_no_rank_has_more_losses_than_the_plan_has_room_for(measured: Measured, name: str) -> None:
    """And where one rank has all of a row's trained tokens, or all are trained, the bound is met."""
    config, ranks = measured[name]
    rows = make_rows(config.model.shape)
    most = [most_going_on(config, row.num_trained) for row in rows]
    for rank in ranks:
        assert all(losses <= bound for (_, losses), bound in zip(rank, most, strict=True))
    if config.parallel.context == 1:
        assert [losses for _, losses in ranks[0]][1:] == most[1:]
    assert ranks[0][-1][1] == most[-1] == layouts.LENGTH / config.parallel.context


def encoded_patches(config: TrainConfig, row: PackedSequence, rank: int) -> int:
    """Patches of a row with its blank frame; where frames are dealt, as many as if every rank had what this one has."""
    layout = config.parallel
    sizes = [int(rows * columns) for rows, columns in row.frames.tolist()]
    ranks = layout.tensor * layout.context if layout.vision == "images" else 1
    own = sum(sizes[frame] for frame in deal_frames(config.model.shape.vision, sizes, ranks)[rank % ranks])
    unit = 4 * layout.vision_tensor
    return ranks * max(unit, -(-own // unit) * unit)
