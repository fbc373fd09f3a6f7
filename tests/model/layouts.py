"""What ranks do in the layout tests: build the model from the oracle's weights and return the loss and the whole gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.config.weight_map import megatron_names
from megatron_glmv.convert import mapping
from megatron_glmv.convert.hf_import import from_state_dict
from megatron_glmv.convert.parameters import local_parameters
from megatron_glmv.model.glm4v import build_model
from megatron_glmv.parallel import groups
from megatron_glmv.sequence.packed import Document, PackedSequence, pack
from megatron_glmv.training.assemble import Assembly, assemble, assemble_model
from megatron_glmv.training.step import _weighted_loss, chunk_inputs, reduce_loss, run_schedule
from tests.model import oracle
from tests.ranks import leave_layout

Result = tuple[float, float, dict[str, Tensor]]
"""Mean loss, norm of the gradient, and the whole gradient by name."""
Layout = tuple[str, dict[str, Any], dict[str, str]]
"""Name, fields of `parallel`, fields of `recompute`."""
GATE = 1e-5
"""Relative; tests/model/test_layouts.py says why."""
LENGTH = 256
ALIGN = 8

ROWS: tuple[tuple[str, ...], ...] = (
    ("several_images", "two_documents"),
    ("text_only", "video_frames", "one_image"),
    ("very_tall_image", "mixed_documents"),
    ("text_only",),
)
"""Rows of the global batch, by the oracle's cases: packed documents, pictures of many shapes, and a row without pictures."""


def make_rows(shape: ModelShape) -> list[PackedSequence]:
    """The rows of the global batch, with normalised patches."""
    cases = oracle.all_cases(shape)
    rows = []
    for number, names in enumerate(ROWS):
        documents: list[Document] = [document for name in names for document in cases[name].documents]
        patches = torch.cat([cases[name].patches for name in names])
        tokens = shape.tokens
        rows.append(
            pack(
                documents,
                LENGTH,
                image_token=tokens.image,
                pad_token=tokens.pad,
                align=ALIGN,
                patches=patches,
                key=f"row-{number}",
            )
        )
    return rows


def train_config(folder: str, layout: dict[str, Any], recompute: dict[str, str]) -> TrainConfig:
    """A configuration of the architecture whose config.json is in `folder`; fp32, gradients whole on every replica."""
    return TrainConfig.model_validate(
        {
            "run_folder": folder,
            "steps": 1,
            "global_batch_rows": len(ROWS),
            "model": {"hf_folder": folder},
            "parallel": {"distributed_optimizer": False, **layout},
            "precision": {"dtype": "fp32", "layers": "torch"},
            "recompute": recompute,
            "data": {"sequence_length": LENGTH, "sources": [{"name": "oracle", "path": "unused"}]},
        }
    )


def losses_and_gradients(
    rank: int, variant: str, folder: str, layouts: Sequence[Layout], all_tokens: bool = False
) -> dict[str, Result] | None:
    """For each (name, layout, recompute) the batch's mean loss, its gradient's norm and the gradient by name, on rank 0.

    With `all_tokens` none is left out behind the last attention: what every layout is held against.
    """
    results = {
        name: _one_layout(variant, train_config(folder, layout, recompute), all_tokens) for name, layout, recompute in layouts
    }
    return results if rank == 0 else None


def _one_layout(variant: str, config: TrainConfig, all_tokens: bool) -> Result:
    leave_layout()
    groups.initialize(config.parallel, seed=1)
    shape = config.model.shape
    models = build_model(shape, config.parallel, config.precision, config.recompute)
    from_state_dict(models, oracle.random_model(variant).state_dict(), shape)
    assembly = assemble(config, models)
    loss = forward_and_backward(assembly, all_tokens=all_tokens)
    assembly.optimizer.prepare_grads()
    norm = float(assembly.optimizer.get_grad_norm())
    own: dict[str, Any] = dict(local_parameters(models))
    local = {name: parameter.main_grad.clone() for name, parameter in own.items()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (parallel_state.get_tensor_model_parallel_rank(), local))
    return loss, norm, _join(gathered, shape)


def forward_and_backward(assembly: Assembly, *, all_tokens: bool = False) -> float:
    """The global batch's mean loss; the gradients lie where Megatron puts them."""

    def forward_step(iterator: Iterator[PackedSequence], chunk: Any) -> tuple[Tensor, Any]:
        inputs = chunk_inputs(assembly.config, next(iterator), chunk.module, all_tokens=True)
        assert inputs.labels.shape == inputs.tokens.shape
        return chunk(inputs), partial(_weighted_loss, inputs.loss_weights)

    rows = make_rows(assembly.shape)
    share = len(rows) // groups.data_size()
    own = rows[groups.data_rank() * share :][:share]
    step = forward_step if all_tokens else None
    return reduce_loss(run_schedule(assembly, own, forward_only=False, forward_step=step))[0]


def assert_same(found: Result, reference: Result) -> None:
    """Loss, norm and every gradient of a layout within the gate of those of one rank."""
    loss, norm, gradient = found
    reference_loss, reference_norm, whole = reference
    assert abs(loss - reference_loss) <= GATE * reference_loss, f"loss {loss}, on one rank {reference_loss}"
    assert abs(norm - reference_norm) <= GATE * reference_norm, f"norm {norm}, on one rank {reference_norm}"
    assert gradient.keys() == whole.keys(), f"only in one of both: {sorted(gradient.keys() ^ whole.keys())}"
    differences = {name: float((gradient[name] - expected).norm() / expected.norm()) for name, expected in whole.items()}
    name = max(differences, key=differences.__getitem__)
    assert differences[name] <= GATE, f"{name} differs by {differences[name]:.1e}"


def _join(gathered: list[tuple[int, dict[str, Tensor]]], shape: ModelShape) -> dict[str, Tensor]:
    """Whole gradients from every rank's; replicas and context ranks must agree bit for bit."""
    shards: dict[str, dict[int, Tensor]] = {}
    for tensor_rank, local in gathered:
        for name, gradient in local.items():
            known = shards.setdefault(name, {}).setdefault(tensor_rank, gradient)
            assert torch.equal(known, gradient), f"{name}: replicas of tensor rank {tensor_rank} hold different gradients"
    whole = megatron_names(shape)
    return {name: _join_shares(name, [parts[rank] for rank in sorted(parts)], whole[name]) for name, parts in shards.items()}


def _join_shares(name: str, parts: list[Tensor], whole: tuple[int, ...]) -> Tensor:
    """Whole from every tensor rank's; what is not cut over tensor ranks must be the same on all of them."""
    if parts[0].shape == whole:
        assert all(torch.equal(part, parts[0]) for part in parts), f"{name}: tensor ranks hold different gradients"
        return parts[0]
    return mapping.join_ranks(name, parts)


def first_weights(rank: int, folder: str, layouts: Sequence[dict[str, Any]]) -> list[dict[str, Tensor]] | None:
    """The whole first random weights by Megatron's names in each layout, on rank 0."""
    found = []
    for layout in layouts:
        config = train_config(folder, layout, {})
        groups.initialize(config.parallel, seed=1)
        local = {name: weight.detach().clone() for name, weight in local_parameters(assemble_model(config)).items()}
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (parallel_state.get_tensor_model_parallel_rank(), local))
        leave_layout()
        found.append(_join(gathered, config.model.shape))
    return found if rank == 0 else None
