"""One step: rows through Megatron's pipeline schedule, gradients over the whole batch's trained tokens, one update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_glmv.config.fp8 import merged_multiple, trained_multiple
from megatron_glmv.config.model import ModelShape, Part
from megatron_glmv.config.training import StageConfig
from megatron_glmv.data.loader import StepRows
from megatron_glmv.model.glm4v import Glm4vModel
from megatron_glmv.model.inputs import FrameShare, ModelInputs, TokenShare, make_inputs
from megatron_glmv.parallel import groups, platform
from megatron_glmv.sequence.packed import PackedSequence, mask_documents
from megatron_glmv.sequence.patches import num_flat_patches
from megatron_glmv.sequence.transfer import to_device
from megatron_glmv.training.agreement import Agreement
from megatron_glmv.training.assemble import Assembly
from megatron_glmv.training.batch_counts import BatchCounts, count_batch
from megatron_glmv.training.guard import Guard
from megatron_glmv.training.optimizer import set_learning_rates, step_optimizer

ForwardStep = Callable[[Iterator[Any], Any], tuple[Tensor, Any]]
"""Megatron's: (iterator of rows, chunk) -> (its output, the function that makes a loss of it)."""


@dataclass(frozen=True)
class StepResult:
    """What one step did; equal on all ranks."""

    loss: float
    """Mean loss of the trained tokens of the global batch."""
    trained_tokens: int
    counts: BatchCounts
    learning_rates: dict[Part, float]
    grad_norm: float
    applied: bool
    """False: a gradient was not finite, or a guard refused the update, and the step changed nothing."""
    agreement: Agreement
    """What the ranks agreed on beside it."""


def train_step(assembly: Assembly, batch: StepRows, step: int, *, guard: Guard | None = None, stop: bool = False) -> StepResult:
    """Run one optimizer update on this replica's rows of the step.

    Args:
        assembly: this rank's model and optimizer.
        batch: this replica's rows; pictures and faults on the decoding rank only.
        step: counted from 0; fixes the learning rates.
        guard: asked before the update whether the step is as usual.
        stop: this rank was asked to stop; all learn of it at the end of the step.
    """
    for chunk in assembly.chunks:
        if not chunk.training:  # it goes through every module, which costs small models a few per cent of a step
            chunk.train()
        chunk.zero_grad_buffer()
    assembly.optimizer.zero_grad()
    assembly.own_gradients.clear()
    rows, bad = agree_on_faults(batch)
    outputs = run_schedule(assembly, rows, forward_only=False)
    rates = set_learning_rates(assembly.optimizer, step, assembly.config)
    loss, tokens = reduce_loss(outputs)
    outcome = step_optimizer(
        assembly.optimizer, accept=lambda norm: guard is None or not guard.find_spike(loss, norm), stop=stop
    )
    counts = count_batch(assembly.config, assembly.shape, rows, bad)
    return StepResult(loss, tokens, counts, rates, outcome.grad_norm, outcome.applied, outcome.agreement)


@torch.no_grad()
def evaluate_step(assembly: Assembly, batch: StepRows) -> tuple[float, int]:
    """Sum of the losses and number of the trained tokens of one batch of held-out rows, over all replicas."""
    for chunk in assembly.chunks:
        chunk.eval()
    rows, _ = agree_on_faults(batch)
    loss, tokens = reduce_loss(run_schedule(assembly, rows, forward_only=True))
    return loss * tokens, tokens


def agree_on_faults(batch: StepRows) -> tuple[list[PackedSequence], int]:
    """Tell every rank of the replica which samples did not decode, and stop training on them.

    Returns:
        The rows with those samples' loss weights at zero, and how many there are.
    """
    flags = [torch.zeros(len(row.documents), dtype=torch.int32) for row in batch.rows]
    for fault in batch.faults:
        flags[fault.row][fault.document] = 1
    joined = torch.cat(flags).to(platform.device())
    groups.broadcast_in_replica(joined)
    bad = int(joined.sum())
    if not bad:
        return list(batch.rows), 0
    parts = joined.cpu().split([len(flag) for flag in flags])
    rows = [mask_documents(row, part.nonzero().flatten().tolist()) for row, part in zip(batch.rows, parts, strict=True)]
    return rows, bad


def run_schedule(
    assembly: Assembly, rows: Sequence[Any], *, forward_only: bool, forward_step: ForwardStep | None = None
) -> list[Any]:
    """Send `rows` through Megatron's schedule for this layout, one row a micro-batch.

    Args:
        assembly: this rank's model.
        rows: packed rows, or what `forward_step` takes from its iterator.
        forward_only: without a backward pass.
        forward_step: what Megatron calls for each row and chunk; None: the weighted loss of packed rows.

    Returns:
        On the last stage, what the loss function reports of each row; for packed rows [2] float32: this context rank's sum of
        weighted losses, and number of trained tokens.
    """
    num_chunks = len(assembly.chunks)
    for model in assembly.models:
        model.set_is_first_microbatch()
    iterators = [_begin_rows(assembly, rows), *(iter(rows) for _ in range(num_chunks - 1))]
    return get_forward_backward_func()(
        forward_step_func=forward_step or partial(_forward_step, assembly.config),
        data_iterator=iterators if num_chunks > 1 else iterators[0],
        model=assembly.chunks if num_chunks > 1 else assembly.chunks[0],
        num_microbatches=len(rows),
        seq_length=assembly.config.sequence_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _begin_rows(assembly: Assembly, rows: Sequence[Any]) -> Iterator[Any]:
    """The rows, each announced when it is taken."""
    for number, row in enumerate(rows, 1):
        assembly.begin_row(number, len(rows), row_key(row))
        yield row


def row_key(row: Any) -> str:
    """The id of a packed row, or of what carries one."""
    return str(getattr(getattr(row, "row", row), "key", ""))


def _forward_step(config: StageConfig, iterator: Iterator[PackedSequence], chunk: Any) -> tuple[Tensor, Any]:
    """Megatron's forward step: run one chunk on the next row; returns its output and the function that makes it a loss."""
    inputs = chunk_inputs(config, next(iterator), chunk.module)
    return chunk(inputs), partial(_weighted_loss, inputs.loss_weights)


def chunk_inputs(config: StageConfig, row: PackedSequence, model: Glm4vModel, *, all_tokens: bool = False) -> ModelInputs:
    """What one chunk of this rank's model reads of a row; collective over the ranks that share the row's pictures.

    Args:
        config: the run's.
        row: with patches on the decoding rank.
        model: the chunk.
        all_tokens: have the losses or logits of all tokens, not of the trained ones alone.
    """
    shape, layout = config.model.shape, config.parallel
    if model.pre_process:
        row = replace(row, patches=_shared_patches(row, shape))
    return make_inputs(
        row,
        shape,
        platform.device(),
        tensor=layout.vision_tensor,
        context=parallel_state.get_context_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        with_vision=model.pre_process,
        merged_multiple=merged_multiple(config.precision, layout),
        share=FrameShare(*groups.place_among_vision_ranks()) if layout.vision == "images" else FrameShare(),
        trained=None if all_tokens else _token_share(config),
    )


def _token_share(config: StageConfig) -> TokenShare:
    multiple = trained_multiple(config.precision, config.parallel)
    if not config.parallel.sequence_parallel:
        return TokenShare(multiple=multiple)
    return TokenShare(
        parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size(), multiple
    )


def _shared_patches(row: PackedSequence, shape: ModelShape) -> Tensor | None:
    """The row's pictures on every rank that runs the vision tower; one rank of the replica has decoded them."""
    if not row.num_patches:
        return None
    patches = row.patches
    if patches is None:
        size = (row.num_patches, shape.vision.patch_dim)
        if row.moving is not None:
            size = (num_flat_patches(row.frames, row.moving), size[1] // shape.vision.temporal_patch_size)
        patches = torch.empty(size, dtype=torch.uint8, device=platform.device())
    patches = to_device(patches, platform.device())
    groups.broadcast_patches(patches)
    return patches


def _weighted_loss(weights: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of weighted losses, number of trained tokens, and both for the report; Megatron divides over the whole batch."""
    loss = (losses * weights).sum()
    trained = (weights > 0).sum()
    return loss, trained.to(torch.int32), torch.stack((loss.detach(), trained.to(torch.float32)))


def reduce_loss(outputs: list[Tensor]) -> tuple[float, int]:
    """Mean loss and number of trained tokens over context ranks, replicas and rows; the same on every rank."""
    total = torch.zeros(2, dtype=torch.float64, device=platform.device())
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        if outputs:
            total += torch.stack(outputs).double().sum(0)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if dist.get_world_size(pipeline) > 1:
        dist.broadcast(total, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline)
    return float(total[0] / total[1].clamp(min=1)), int(total[1])
