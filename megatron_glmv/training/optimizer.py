"""Megatron's optimizer with a learning rate per part of the model, and an update that refuses non-finite gradients.

Megatron checks gradients for inf and nan only with a loss scale (fp16); in bf16 and fp32 a bad batch would poison the weights.
Here the global gradient norm, which every rank knows before it clips, decides for all of them.

Source: megatron-core 0.16.1, optimizer/__init__.py (groups and their overrides), optimizer/optimizer.py (order of a step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from megatron_glmv.config.model import Part
from megatron_glmv.config.training import StageConfig
from megatron_glmv.training.agreement import Agreement, agree
from megatron_glmv.training.schedule import learning_rate, part_rates

PARTS: tuple[Part, ...] = ("vision", "merger", "text")


@dataclass(frozen=True)
class StepOutcome:
    """What one call of :func:`step_optimizer` did; equal on all ranks."""

    applied: bool
    """False: the gradients were not finite somewhere, or a guard refused them, and nothing changed anywhere."""
    grad_norm: float
    """Norm of the gradient over all parameters, before clipping; inf or nan when not finite."""
    agreement: Agreement
    """What the ranks agreed on."""


def part_of(name: str) -> Part:
    """Part of the model that a parameter belongs to, by its name in the model."""
    if "vision_model" in name:
        return "vision"
    return "merger" if "vision_projection" in name else "text"


def is_decayed(parameter: torch.Tensor, name: str) -> bool:
    """Whether weight decay applies: to matrices and tables, not to norms and biases."""
    return parameter.dim() > 1 and not name.endswith((".bias", "layer_norm_weight", "layernorm.weight"))


def build_optimizer(model_chunks: Sequence[DistributedDataParallel], config: StageConfig) -> MegatronOptimizer:
    """Build the optimizer of this rank's model chunks; every rank must call it.

    Groups are the same on every rank, with empty ones where a rank has no such parameter, so a stage whose parameters are all
    frozen takes part in every collective.

    Args:
        model_chunks: the wrapped model, one per virtual pipeline chunk; frozen parameters have
            ``requires_grad`` off already.
        config: the whole configuration.
    """
    own = config.optimizer
    megatron = OptimizerConfig(
        optimizer="adam",
        lr=own.lr,
        min_lr=own.min_lr,
        weight_decay=own.weight_decay,
        adam_beta1=own.beta1,
        adam_beta2=own.beta2,
        adam_eps=own.epsilon,
        clip_grad=own.clip_grad_norm,
        bf16=config.precision.dtype == "bf16",
        params_dtype=torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=model_chunks[0].ddp_config.overlap_param_gather,
    )
    return get_megatron_optimizer(
        megatron, list(model_chunks), config_overrides=_overrides(config), use_gloo_process_groups=False
    )


def _overrides(config: StageConfig) -> dict[ParamKey, ParamGroupOverride]:
    """One group per part and kind of weight decay."""
    overrides: dict[ParamKey, ParamGroupOverride] = {}
    for part in PARTS:
        rates = part_rates(config.optimizer, part)
        belongs = ParamWithNamePredicate(name=part, fn=lambda _, name, part=part: part_of(name) == part)
        # Megatron tells groups apart on load by wd_mult, lr_mult, is_expert_parallel and is_decoupled_lr alone, so the last
        # one carries the part; nothing reads it as a flag.
        group: Any = {"max_lr": rates.peak, "min_lr": rates.floor, "is_decoupled_lr": part}
        overrides[ParamKey(with_name_predicate=belongs)] = group
    undecayed = ParamWithNamePredicate(name="undecayed", fn=lambda parameter, name: not is_decayed(parameter, name))
    overrides[ParamKey(with_name_predicate=undecayed)] = ParamGroupOverride(wd_mult=0.0)
    return overrides


def set_learning_rates(optimizer: MegatronOptimizer, step: int, config: StageConfig) -> dict[Part, float]:
    """Give every group its learning rate and weight decay for one update.

    Args:
        optimizer: of :func:`build_optimizer`.
        step: update, counted from 0.
        config: the whole configuration.

    Returns:
        Learning rate of each part, whether this rank has it or not.
    """
    rates = {part: learning_rate(step, config.optimizer, config.steps, part) for part in PARTS}
    for group in optimizer.param_groups:
        group["lr"] = rates[group["is_decoupled_lr"]]
        group["weight_decay"] = config.optimizer.weight_decay * group["wd_mult"]
    return rates


@torch.no_grad()
def step_optimizer(
    optimizer: MegatronOptimizer,
    *,
    accept: Callable[[float], bool] = lambda grad_norm: True,
    stop: bool = False,
) -> StepOutcome:
    """Clip and apply the gradients of one step, or nothing at all if any rank has a non-finite one; every rank must call it.

    When skipped, parameters, moments and the optimizer's own step count stay as they are.

    Args:
        optimizer: with the reduced gradients of the step.
        accept: told the gradient norm if it is finite, whether the update is wanted.
        stop: this rank was asked to stop; the others learn of it with the same message.
    """
    overflow = optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    finite = math.isfinite(grad_norm) and not overflow and _duplicates_finite(optimizer)
    found = agree(finite=finite, accepted=not finite or accept(grad_norm), stop=stop)
    if not found.finite:
        return StepOutcome(False, grad_norm if not math.isfinite(grad_norm) else math.nan, found)
    if not found.accepted:
        return StepOutcome(False, grad_norm, found)
    if optimizer.config.clip_grad > 0:
        for inner in optimizer.chained_optimizers:
            parameters = inner.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=optimizer.config.clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()
    return StepOutcome(True, grad_norm, found)


def gather_weights(model_chunks: Sequence[DistributedDataParallel]) -> None:
    """Make the weights whole on every rank, where they wait to be gathered behind the next forward pass.

    Until then a rank has the last update in its own share of them only; so whatever reads them between two steps, to save them
    or to send them to an engine, calls this first.

    Source: Megatron-LM, megatron/training/training.py, which does the same before it saves.
    """
    for chunk in model_chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _duplicates_finite(optimizer: MegatronOptimizer) -> bool:
    """Whether the gradients that the norm leaves out, those of parameters repeated on tensor ranks, are finite here."""
    grads = [
        parameter.grad
        for parameter in optimizer.get_parameters()
        if parameter.grad is not None and not param_is_not_tensor_parallel_duplicate(parameter)
    ]
    return all(bool(norm.isfinite()) for norm in torch._foreach_norm(grads)) if grads else True
