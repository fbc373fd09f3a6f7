"""From the groups that are trained on to the policy's updates: dealt, packed, pixels fetched, updated.

Source: arXiv 2507.01006, section 5.4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from megatron_glmv.config.model import Part
from megatron_glmv.config.rl_stage import RlConfig
from megatron_glmv.parallel import groups as ranks
from megatron_glmv.rl.advantage import group_advantages
from megatron_glmv.rl.batch import (
    PolicyRow,
    PolicySample,
    RepackReport,
    Skipped,
    build_row,
    compute_loads,
    describe_plan,
    divide,
    make_samples,
)
from megatron_glmv.rl.loss import PolicyStats, merge_stats
from megatron_glmv.rl.reference import Reference
from megatron_glmv.rl.repack import plan_rows
from megatron_glmv.rl.types import Group, Prompt
from megatron_glmv.rl.update import old_logprobs, update_policy
from megatron_glmv.training.assemble import Assembly
from megatron_glmv.training.optimizer import set_learning_rates


@dataclass(frozen=True)
class PolicyReport:
    """What the updates of one iteration did; equal on all ranks.

    Attributes:
        stats: of all updates; None where there was nothing to train on.
        grad_norm: of the last update, before clipping.
        updates: that were applied.
        refused: that were not, because a gradient was not finite.
        fault: whose gradients they were, the last time.
        learning_rates: by part.
        skipped: answers that were not trained on.
        repack: of the first update.
        tokens: of prompts and answers that were trained on.
    """

    stats: PolicyStats | None
    grad_norm: float
    updates: int
    refused: int
    learning_rates: dict[Part, float]
    skipped: Skipped
    repack: RepackReport | None
    tokens: int
    fault: str = ""


@dataclass(frozen=True)
class _Part:
    """What one update runs on this replica."""

    rows: list[PolicyRow]
    skipped: Skipped
    repack: RepackReport | None
    tokens: int


def update_on(
    assembly: Assembly,
    config: RlConfig,
    groups: Sequence[Group],
    step: int,
    read_pixels: Callable[[Group], Prompt],
    reference: Reference | None = None,
) -> PolicyReport:
    """Update the policy on groups; every rank calls this with the same ones.

    Args:
        assembly: this rank's model and optimizer.
        config: of the stage.
        groups: to train on, without pixels.
        step: iterations done; fixes the learning rates.
        read_pixels: decodes a group's prompt again, on the ranks that need it.
        reference: policy of the KL term, where there is one.
    """
    parts = [_plan(config, part, read_pixels) for part in divide(groups, config.algorithm.updates_per_rollout)]
    parts = [part for part in parts if part.repack is not None]
    temperature = config.sampling.temperature
    is_old = len(parts) == 1
    if not is_old:
        parts = [replace(part, rows=old_logprobs(assembly, part.rows, temperature)) for part in parts]
    if reference is not None:
        parts = [replace(part, rows=reference.add_logprobs(assembly, part.rows, temperature)) for part in parts]
    results = [update_policy(assembly, part.rows, step, config.algorithm, temperature, is_old=is_old) for part in parts]
    return PolicyReport(
        stats=merge_stats([result.stats for result in results]) if results else None,
        grad_norm=results[-1].grad_norm if results else 0.0,
        updates=sum(result.applied for result in results),
        refused=sum(not result.applied for result in results),
        learning_rates=set_learning_rates(assembly.optimizer, step, config),
        skipped=_total([part.skipped for part in parts]),
        repack=parts[0].repack if parts else None,
        tokens=sum(part.tokens for part in parts),
        fault=next((result.fault for result in reversed(results) if result.fault), ""),
    )


def _plan(config: RlConfig, groups: Sequence[Group], read_pixels: Callable[[Group], Prompt]) -> _Part:
    """Deal the answers of one update, and build this replica's rows."""
    shape, length, align = config.model.shape, config.repack.row_length, config.parallel.row_alignment
    advantages = group_advantages(groups, config.algorithm)
    image = shape.tokens.image
    samples, skipped = make_samples(groups, advantages, row_length=length, image_token=image, align=align)
    if not samples:
        return _Part([], skipped, None, 0)
    model, pipeline = config.model, config.parallel
    plan = plan_rows(
        [len(sample.tokens) for sample in samples],
        compute_loads(shape, samples, model.freeze, model.lora),
        num_ranks=ranks.data_size(),
        row_length=length,
        align=align,
        patches=[sample.num_patches for sample in samples],
        max_patches=config.repack.max_patches,
        multiple=pipeline.pipeline if pipeline.virtual_pipeline > 1 else 1,
    )
    report = describe_plan(plan, samples, shape, row_length=length, freeze=model.freeze, lora=model.lora)
    own = plan[ranks.data_rank()]
    if ranks.decodes_media():
        samples = _with_pixels(samples, [place for row in own for place in row], groups, read_pixels)
    tokens: dict[str, Any] = {"image_token": image, "pad_token": shape.tokens.pad}
    merge = shape.vision.spatial_merge_size
    rows = [build_row([samples[place] for place in row], length, **tokens, align=align, merge=merge) for row in own]
    return _Part(rows, skipped, report, sum(len(sample.tokens) for sample in samples))


def _with_pixels(
    samples: Sequence[PolicySample], own: Sequence[int], groups: Sequence[Group], read_pixels: Callable[[Group], Prompt]
) -> list[PolicySample]:
    """The samples, with patches where they stand in own rows; each prompt is decoded once."""
    found: dict[int, Tensor | None] = {}
    filled = list(samples)
    for place in own:
        group = samples[place].group
        if group not in found:
            found[group] = read_pixels(groups[group]).patches
        filled[place] = replace(samples[place], patches=found[group])
    return filled


def _total(parts: Sequence[Skipped]) -> Skipped:
    names = vars(Skipped())
    return Skipped(**{name: sum(getattr(part, name) for part in parts) for name in names})
