"""What ranks do in the planner's tests: build the real model, DDP buffers and optimizer of many layouts, and weigh them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_glmv.config.training import TrainConfig
from tests.ranks import leave_layout


def weigh_all(
    rank: int, trees: Sequence[dict[str, Any]], bucket_elements: int
) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    """For each configuration, this rank's place in the layout, its parameters, and bytes of its state after an update.

    Beside them, for the last configuration, the buckets of its gradients where a bucket has so few elements.
    """
    return [_weigh(TrainConfig.model_validate(tree)) for tree in trees], _buckets(
        TrainConfig.model_validate(trees[-1]), bucket_elements
    )


def _buckets(config: TrainConfig, bucket_elements: int) -> list[tuple[int, int]]:
    """Start and end of each bucket of Megatron's buffer of one stage."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_glmv.parallel import groups
    from megatron_glmv.training.assemble import assemble_model

    leave_layout()
    groups.initialize(config.parallel, seed=1)
    (model,) = assemble_model(config)
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=True, use_distributed_optimizer=True, bucket_size=bucket_elements
    )
    (buffer,) = DistributedDataParallel(model.config, options, model).buffers
    return buffer.bucket_indices


def _weigh(config: TrainConfig) -> dict[str, Any]:
    from megatron.core import parallel_state

    from megatron_glmv.parallel import groups
    from megatron_glmv.training.assemble import assemble, assemble_model
    from megatron_glmv.training.optimizer import set_learning_rates, step_optimizer

    leave_layout()
    groups.initialize(config.parallel, seed=1)
    assembly = assemble(config, assemble_model(config))
    for chunk in assembly.chunks:
        chunk.zero_grad_buffer()
    assembly.optimizer.zero_grad()
    set_learning_rates(assembly.optimizer, 0, config)
    assert step_optimizer(assembly.optimizer).applied
    buffers = [buffer for chunk in assembly.chunks for buffer in chunk.buffers]
    in_buffers = {p for buffer in buffers for p in buffer.params} if config.parallel.distributed_optimizer else set()
    apart = [p for model in assembly.models for p in model.parameters() if p not in in_buffers]
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "sharer": parallel_state.get_data_parallel_rank(with_context_parallel=True),
        "data": groups.data_size(),
        "shapes": [[(name, p.numel()) for name, p in model.named_parameters()] for model in assembly.models],
        "weights": sum(b.param_data.nbytes for b in buffers if b.param_data is not None) + sum(p.nbytes for p in apart),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": _optimizer_bytes(assembly.optimizer),
        "gathered": sum(_gathered_bytes(inner) for inner in assembly.optimizer.chained_optimizers),
    }


def _gathered_bytes(optimizer: Any) -> int:
    """Of host memory in which a save gathers one optimizer's state, if it is the distributed one."""
    if optimizer.is_stub_optimizer or not hasattr(optimizer, "get_parameter_state_dp_zero"):
        return 0
    state = optimizer.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
    return sum(
        tensor.nbytes
        for buffer in state.values()
        if isinstance(buffer, dict)
        for tensors in buffer.values()
        for tensor in tensors.values()
        if hasattr(tensor, "nbytes")
    )


def _optimizer_bytes(optimizer: Any) -> int:
    """Of every tensor that the optimizer holds beside weights and gradients: fp32 copies and moments."""
    total = 0
    for inner in optimizer.chained_optimizers:
        if inner.is_stub_optimizer:
            continue
        copies = getattr(inner, "shard_fp32_from_float16_groups", None) or getattr(inner, "fp32_from_float16_groups", [])
        total += sum(tensor.nbytes for group in copies for tensor in group)
        total += sum(value.nbytes for state in inner.optimizer.state.values() for value in state.values())
    return total
