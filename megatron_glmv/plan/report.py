"""A plan as text for people and as a tree for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_glmv.config.rl_stage import RlConfig
from megatron_glmv.config.summary import short
from megatron_glmv.config.training import StageConfig
from megatron_glmv.plan.estimate import Plan
from megatron_glmv.plan.memory import StageMemory
from megatron_glmv.plan.rows import RowSample
from megatron_glmv.plan.search import override_line
from megatron_glmv.plan.weights import SAVED_BYTES

GB = 1e9
_COLUMNS = ("stage", "layers", "rows held", "weights", "grads", "optim", "fp8", "activ", "logits", "work", "buffers", "other",
            "GB", "busy")  # fmt: skip


def describe(plan: Plan, rows: RowSample, kind: str) -> str:
    """The whole account of one plan, a few lines a subject."""
    hardware, layout = plan.hardware, plan.config.parallel
    split = ", ".join(str(stage.layers) for stage in plan.stages)
    stages = f"{layout.pipeline} ({split} layers)" if layout.pipeline > 1 else "1"
    chunks = f" x virtual {layout.virtual_pipeline}" if layout.virtual_pipeline > 1 else ""
    lines = [
        f"layout      {plan.gpus:,} {hardware.name}: data {plan.data:,} x tensor {layout.tensor} x pipeline {stages}{chunks} x "
        f"context {layout.context}; recompute text {plan.config.recompute.text}, vision {plan.config.recompute.vision}",
        f"rows        {rows.origin}",
        f"            {rows.mean_tokens:,.0f} useful tokens a row, {rows.mean_trained:,.0f} of them trained (at most "
        f"{rows.max_trained:,.0f}), and {rows.mean_patches:,.0f} patches (at most {rows.max_patches:,.0f});",
        f"            {plan.rows:,} rows a step, {plan.rows // plan.data:,} a replica",
        f"memory      10^9 bytes of the fullest rank of each stage; the GPU has {hardware.memory_gb:g}",
        *_memory_table(plan),
        *_host_lines(plan),
        *_step_lines(plan),
        *_traffic_lines(plan),
        *_assumption_lines(plan, kind),
    ]
    return "\n".join(lines)


def _memory_table(plan: Plan) -> list[str]:
    table = [_COLUMNS, *(_stage_row(plan, number, stage) for number, stage in enumerate(plan.stages))]
    widths = [max(len(row[column]) for row in table) for column in range(len(_COLUMNS))]
    return ["            " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]


def _host_lines(plan: Plan) -> list[str]:
    if not plan.host_memory:
        return []
    ranks = min(plan.gpus, plan.hardware.gpus_per_node)
    each = f"{SAVED_BYTES} bytes of every element that learns, on each of {ranks} ranks"
    return [f"host        {plan.host_memory / GB:.0f} GB of a node's own memory at a save and at a resume ({each})"]


def _stage_row(plan: Plan, number: int, stage: StageMemory) -> tuple[str, ...]:
    state = stage.state
    parts = (state.weights, state.gradients, state.optimizer, stage.fp8, stage.activations, stage.logits, stage.working,
             stage.buffers, stage.overhead, stage.total)  # fmt: skip
    busy = plan.timeline.busy[number] / plan.timeline.total
    flying = "+".join(map(str, stage.in_flight))
    return (str(number), str(stage.layers), flying, *(f"{part / GB:.1f}" for part in parts), f"{busy:.0%}")


def _step_lines(plan: Plan) -> list[str]:
    parts = f"schedule {plan.timeline.total:.2f} (bubble {plan.timeline.bubble:.1%})"
    if plan.skew != 1.0:
        parts += f" x {plan.skew:.3f} (slowest of {plan.data:,} replicas)"
    parts += f" + traffic that nothing hides {plan.exposed_s:.2f} + update {plan.optimizer_s:.2f}"
    days, unit = plan.hours / 24, "iterations" if isinstance(plan.config, RlConfig) else "steps"
    note = "; rollouts and rewards are not counted" if isinstance(plan.config, RlConfig) else ""
    return [
        f"step        {plan.step_s:.2f} s = {parts}",
        f"speed       MFU {plan.mfu:.1%}, {short(plan.tokens_s)} tokens/s, {plan.tokens_s / plan.gpus:,.0f} a GPU",
        f"stage       {plan.config.steps:,} {unit} in {days:,.1f} days = {plan.hours * plan.gpus:,.0f} GPU-hours{note}",
    ]


def _traffic_lines(plan: Plan) -> list[str]:
    axes = {name: size for name, size in dataclasses.asdict(plan.traffic).items() if size}
    shown = ", ".join(f"{name} {size / GB:,.1f}" for name, size in axes.items()) or "none"
    return [f"traffic     10^9 bytes that the busiest rank sends in a step: {shown}"]


def _assumption_lines(plan: Plan, kind: str) -> list[str]:
    hw = plan.hardware
    return [
        f"assumed     layers {kind}; products reach {hw.matmul_efficiency:.0%} of {hw.bf16_tflops:g} TFLOPS, attention "
        f"{hw.attention_efficiency:.0%}; memory {hw.memory_efficiency:.0%} of {hw.memory_gbs:g} GB/s, links "
        f"{hw.link_efficiency:.0%} of {hw.link_gbs:g} GB/s,",
        f"            {hw.network_efficiency:.0%} of {hw.network_gbs:g} GB/s a GPU between nodes of {hw.gpus_per_node}; "
        f"{hw.overlap:.0%} of what is sent beside computation hides; {hw.overhead_gb:g} GB of CUDA and NCCL,",
        f"            {hw.fragmentation:.0%} of moving memory lost to fragments (--hardware FILE.yaml)",
    ]


def list_layouts(base: StageConfig, plans: Sequence[Plan], tried: int) -> str:
    """The layouts of a search, the fastest first, each with what to append to the command."""
    lines = [f"layouts     the fastest of {tried:,} that fit on {plans[0].gpus:,} GPUs" if plans else "layouts     none fits"]
    for plan in plans:
        line = override_line(base, plan.config) or "(as configured)"
        facts = f"{plan.step_s:8.2f} s  MFU {plan.mfu:5.1%}  {plan.memory / GB:5.1f} GB  bubble {plan.timeline.bubble:5.1%}"
        lines.append(f"            {facts}   {line}")
    return "\n".join(lines)


def shortage(plan: Plan) -> str:
    """What does not fit, in one clause."""
    number, stage = max(enumerate(plan.stages), key=lambda item: item[1].total)
    state = stage.state
    parts = {
        "weights": state.weights,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        "activations": stage.activations,
        "logits": stage.logits,
        "FP8 copies": stage.fp8,
    }
    largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
    shown = ", ".join(f"{name} {size / GB:.1f}" for name, size in largest)
    where = f"stage {number} of {len(plan.stages)}" if len(plan.stages) > 1 else "a rank"
    return f"{where} needs {stage.total / GB:.1f} GB where {plan.hardware.name} has {plan.hardware.memory_gb:g} ({shown})"


def to_tree(plan: Plan, base: StageConfig) -> dict[str, Any]:
    """A plan as plain values for JSON; bytes and seconds."""
    return {
        "gpus": plan.gpus,
        "data": plan.data,
        "overrides": override_line(base, plan.config),
        "layout": plan.config.parallel.model_dump(mode="json"),
        "recompute": plan.config.recompute.model_dump(mode="json"),
        "fits": plan.fits,
        "memory_bytes": plan.memory,
        "host_bytes": plan.host_memory,
        "stages": [dataclasses.asdict(stage) | {"total": stage.total} for stage in plan.stages],
        "rows_per_step": plan.rows,
        "step_s": plan.step_s,
        "schedule_s": plan.timeline.total,
        "bubble": plan.timeline.bubble,
        "busy_s": list(plan.timeline.busy),
        "skew": plan.skew,
        "exposed_s": plan.exposed_s,
        "optimizer_s": plan.optimizer_s,
        "mfu": plan.mfu,
        "tokens_s": plan.tokens_s,
        "stage_hours": plan.hours,
        "gpu_hours": plan.hours * plan.gpus,
        "traffic_bytes": dataclasses.asdict(plan.traffic),
        "hardware": plan.hardware.model_dump(mode="json"),
    }
