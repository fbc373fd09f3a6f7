"""A rank's live parameters under the names that they have in the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.weight_map import check_names, megatron_names
from megatron_glmv.model.lora import ADAPTER, Adapter, has_adapter
from megatron_glmv.model.names import full_module_names


def local_parameters(model_chunks: Sequence[Module]) -> dict[str, Parameter]:
    """This rank's weights (its tensor shard of each) by full name; adapters are not among them.

    Args:
        model_chunks: the rank's chunks of the model, with or without Megatron's wrappers.
    """
    return {name: parameter for name, parameter in _all_parameters(model_chunks).items() if not has_adapter(name)}


def local_adapters(model_chunks: Sequence[Module]) -> dict[str, Parameter]:
    """This rank's adapters, as `local_parameters`; empty without LoRA."""
    return {name: parameter for name, parameter in _all_parameters(model_chunks).items() if has_adapter(name)}


def adapters_of_weights(model_chunks: Sequence[Module]) -> dict[str, Adapter]:
    """This rank's adapters by the full name of the weight that each one adds to; empty without LoRA."""
    found: dict[str, Adapter] = {}
    for chunk in unwrap_model(list(model_chunks)):
        for name, full in full_module_names(chunk).items():
            if full.endswith(f".{ADAPTER}"):
                adapter = chunk.get_submodule(name)
                assert isinstance(adapter, Adapter)
                found[full.removesuffix(ADAPTER) + "weight"] = adapter
    return found


def _all_parameters(model_chunks: Sequence[Module]) -> dict[str, Parameter]:
    found: dict[str, Parameter] = {}
    for chunk in unwrap_model(list(model_chunks)):
        full = full_module_names(chunk)
        for name, parameter in chunk.named_parameters():
            module, _, own_name = name.rpartition(".")
            found[f"{full[module]}.{own_name}"] = parameter
    return found


@dataclass(frozen=True)
class Owner:
    """Where a parameter lives: the pipeline rank that holds it, and the dtype in which that rank has it."""

    stage: int
    dtype: torch.dtype


def pipeline_owners(local: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Owner]:
    """Who holds each parameter; collective over the pipeline ranks.

    Args:
        local: this rank's tensors by full name.
        shape: the architecture.

    Raises:
        MappingError: the stages together hold a parameter that no rule covers, or lack one that a rule needs.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    held = {name: tensor.dtype for name, tensor in local.items()}
    stages: list[dict[str, torch.dtype]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(stages, held, group=group)
    owners = {name: Owner(stage, dtype) for stage, names in enumerate(stages) for name, dtype in names.items()}
    check_names(owners, megatron_names(shape), "the model's parameters")
    return owners
