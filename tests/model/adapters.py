"""Random adapters of any layout, and what ranks do with them: losses, gradients by name, and their norm."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_glmv.config.training import TrainConfig
from megatron_glmv.convert import mapping
from megatron_glmv.convert.hf_import import from_state_dict
from megatron_glmv.convert.lora import adapter_plans
from megatron_glmv.convert.parameters import local_adapters, local_parameters
from megatron_glmv.model.glm4v import Glm4vModel
from megatron_glmv.parallel import groups
from megatron_glmv.training.assemble import assemble, assemble_model
from tests.model import oracle
from tests.model.layouts import Result, forward_and_backward, train_config
from tests.ranks import leave_layout

EVERYTHING = ("*",)
SOME = ("language_model.layers.[13].*.q_proj", "v_proj", "visual.blocks.1.mlp.up_proj", "merger.gate_proj", "merger.down_proj")
"""Some of the layers, some of the rows of fused products, nothing in the first layers and in the head."""


def lora_config(folder: str, layout: dict[str, Any], recompute: dict[str, str], **lora: Any) -> TrainConfig:
    """A layout test's configuration with adapters of rank 4 and scale 2."""
    tree = train_config(folder, layout, recompute).model_dump()
    tree["model"]["lora"] = {"rank": 4, "alpha": 8, "targets": EVERYTHING, **lora}
    return TrainConfig.model_validate(tree)


def build(config: TrainConfig, variant: str = "digits") -> list[Glm4vModel]:
    """This rank's chunks with the oracle's weights and random adapters."""
    models = assemble_model(config)
    from_state_dict(models, oracle.random_model(variant).state_dict(), config.model.shape)
    fill(models, config)
    return models


@torch.no_grad()
def fill(models: Sequence[Glm4vModel], config: TrainConfig) -> None:
    """Give every adapter its share of random values that depend on its name alone; rows without an adapter stay zero."""
    lora, rank = config.model.lora, parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    assert lora is not None
    for name, parameter in local_adapters(models).items():
        module, _, kind = name.rpartition(".adapter.")[0], None, name.rpartition(".")[2]
        plan = adapter_plans(lora, config.model.shape)[module]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if kind == "lora_A":
            whole = torch.randn(plan.num_adapters * lora.rank, plan.inputs, generator=generator) * plan.inputs**-0.5
        else:
            whole = torch.randn(plan.outputs, lora.rank, generator=generator) * 0.05
            whole[plan.adapter_of_row() < 0] = 0
        parameter.copy_(mapping.slice_for_rank(f"{module}.weight", whole, rank, size) if is_split(plan.split, kind) else whole)


def is_split(split: str, kind: str) -> bool:
    """Whether tensor ranks hold shares of A or B."""
    return split == "columns" if kind == "lora_A" else split in ("rows", "gated_rows")


def losses_and_gradients(
    rank: int, folder: str, cases: Sequence[tuple[Any, dict[str, Any], dict[str, str], dict[str, Any]]]
) -> dict[str, Result] | None:
    """For each (name, layout, recompute, lora) the mean loss, the gradient's norm and the gradient by name, on rank 0."""
    results = {}
    for name, layout, recompute, lora in cases:
        config = lora_config(folder, layout, recompute, **lora)
        groups.initialize(config.parallel, seed=1)
        results[name] = _one_layout(config)
        leave_layout()
    return results if rank == 0 else None


def cases_and_first_adapters(
    rank: int, folder: str, cases: Sequence[Any], layouts: Sequence[dict[str, Any]]
) -> tuple[dict[str, Result] | None, list[dict[str, Tensor]]]:
    """`losses_and_gradients`, and the whole adapters that a run starts with in each layout."""
    first = []
    for layout in layouts:
        config = lora_config(folder, layout, {})
        groups.initialize(config.parallel, seed=1)
        local = {name: parameter.detach() for name, parameter in local_adapters(assemble_model(config)).items()}
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (parallel_state.get_tensor_model_parallel_rank(), local))
        first.append(join(gathered, config))
        leave_layout()
    return losses_and_gradients(rank, folder, cases), first


def _one_layout(config: TrainConfig) -> Result:
    models = build(config)
    assembly = assemble(config, models)
    loss = forward_and_backward(assembly)
    assembly.optimizer.prepare_grads()
    norm = float(assembly.optimizer.get_grad_norm())
    assert not any(weight.requires_grad for weight in local_parameters(models).values())
    gathered: list[Any] = [None] * dist.get_world_size()
    gradients = {name: parameter.main_grad.clone() for name, parameter in local_adapters(models).items()}
    dist.all_gather_object(gathered, (parallel_state.get_tensor_model_parallel_rank(), gradients))
    return loss, norm, join(gathered, config)


def join(gathered: list[tuple[int, dict[str, Tensor]]], config: TrainConfig) -> dict[str, Tensor]:
    """Whole tensors of adapters from every rank's; what is repeated must be the same bit for bit."""
    lora, whole = config.model.lora, {}
    assert lora is not None
    plans = adapter_plans(lora, config.model.shape)
    for name in {name for _, local in gathered for name in local}:
        module, kind = name.rpartition(".adapter.")[0], name.rpartition(".")[2]
        shards: dict[int, Tensor] = {}
        split = is_split(plans[module].split, kind)
        for tensor_rank, local in gathered:
            if name in local:
                known = shards.setdefault(tensor_rank if split else 0, local[name])
                assert torch.equal(known, local[name]), f"{name}: ranks that repeat it differ"
        parts = [shards[rank] for rank in sorted(shards)]
        whole[name] = mapping.join_ranks(f"{module}.weight", parts) if split else parts[0]
    return whole
