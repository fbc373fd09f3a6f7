"""The policy's update on this rank: its own log-probabilities before it, then the clipped loss through Megatron's schedule.

The rows pass through the same schedule, the same chunks and the same optimizer step as those of training; only the loss is
another. The schedule divides the gradient by the number of answers of the global batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_glmv.config.rl import AlgorithmConfig
from megatron_glmv.parallel import platform
from megatron_glmv.rl.batch import PolicyRow
from megatron_glmv.rl.loss import PolicyStats, merge_stats, policy_loss
from megatron_glmv.training.assemble import Assembly
from megatron_glmv.training.optimizer import set_learning_rates, step_optimizer
from megatron_glmv.training.step import chunk_inputs, run_schedule


@dataclass(frozen=True)
class UpdateResult:
    """What one update did; equal on all ranks.

    Attributes:
        stats: over the global batch.
        grad_norm: before clipping.
        applied: False: a gradient was not finite, and the update changed nothing.
        fault: then, whose gradients they were.
    """

    stats: PolicyStats
    grad_norm: float
    applied: bool
    fault: str = ""


@torch.no_grad()
def old_logprobs(assembly: Assembly, rows: Sequence[PolicyRow], temperature: float) -> list[PolicyRow]:
    """The rows with the log-probabilities of the policy as it is now, on the ranks of the last stage.

    Args:
        assembly: this rank's model.
        rows: this replica's.
        temperature: of the sampling.
    """
    for chunk in assembly.chunks:
        chunk.eval()
    found = run_schedule(assembly, rows, forward_only=True, forward_step=partial(_report_logprobs, assembly, temperature))
    if not found:
        return list(rows)
    return [
        replace(row, terms=row.terms.with_old(_whole(index, logprobs, row.terms.old_logprobs)))
        for row, (index, logprobs) in zip(rows, found, strict=True)
    ]


def update_policy(
    assembly: Assembly,
    rows: Sequence[PolicyRow],
    step: int,
    algorithm: AlgorithmConfig,
    temperature: float,
    *,
    is_old: bool = False,
) -> UpdateResult:
    """One optimizer update on this replica's rows.

    Args:
        assembly: this rank's model and optimizer.
        rows: with the old policy's log-probabilities; as many on every replica.
        step: counted from 0; fixes the learning rates.
        algorithm: clip bounds and optional terms.
        temperature: of the sampling.
        is_old: the model is still the policy that sampled the answers: what this pass computes are the old log-probabilities,
            and those of the rows are not read.
    """
    for chunk in assembly.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    assembly.optimizer.zero_grad()
    assembly.own_gradients.clear()
    reports = run_schedule(
        assembly, rows, forward_only=False, forward_step=partial(_policy_step, assembly, algorithm, temperature, is_old)
    )
    set_learning_rates(assembly.optimizer, step, assembly.config)
    outcome = step_optimizer(assembly.optimizer)
    fault = "" if outcome.applied else assembly.own_gradients.blame()
    return UpdateResult(_reduce(reports), outcome.grad_norm, outcome.applied, fault)


def _report_logprobs(assembly: Assembly, temperature: float, iterator: Iterator[PolicyRow], chunk: Any) -> tuple[Tensor, Any]:
    inputs = chunk_inputs(assembly.config, next(iterator).row, chunk.module)

    def report(losses: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        return losses.sum(), torch.ones((), dtype=torch.int32, device=losses.device), (inputs.label_index, -losses.detach())

    return chunk(inputs, temperature=temperature), report


def _policy_step(
    assembly: Assembly,
    algorithm: AlgorithmConfig,
    temperature: float,
    is_old: bool,
    iterator: Iterator[PolicyRow],
    chunk: Any,
) -> tuple[Tensor, Any]:
    row = next(iterator)
    inputs = chunk_inputs(assembly.config, row.row, chunk.module)

    def loss(output: Tensor) -> tuple[Tensor, Tensor, PolicyStats]:
        losses, entropy = output
        terms = row.terms.at(inputs.label_index, losses.device)
        if is_old:
            terms = terms.with_old(-losses.detach())
        result = policy_loss(-losses, inputs.loss_weights, terms, algorithm, entropy)
        return result.losses.sum(), result.num_answers, result.stats

    return chunk(inputs, temperature=temperature, entropy="learn" if algorithm.entropy_coefficient else "report"), loss


def _whole(index: Tensor, own: Tensor, like: Tensor) -> Tensor:
    """A tensor of all the row's tokens with this context rank's trained ones filled in."""
    values = torch.zeros_like(like)
    values[index] = own.reshape(-1).to(values.device, values.dtype)
    return values


def _reduce(reports: Sequence[PolicyStats]) -> PolicyStats:
    """Statistics over rows, context ranks and replicas; the same on every rank."""
    found = merge_stats(reports, platform.device())
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(found.sums, group=replicas)
        dist.all_reduce(found.maxima, op=dist.ReduceOp.MAX, group=replicas)
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if dist.get_world_size(pipeline) > 1:
        for values in (found.sums, found.maxima):
            dist.broadcast(values, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline)
    return found
