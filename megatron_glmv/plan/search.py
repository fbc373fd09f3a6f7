"""The best layouts of a stage for a number of GPUs, among all that model, batch and packed data admit.

Every layout is planned from its equal rows and a short schedule; the best are then planned in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_glmv.config.base import ConfigError
from megatron_glmv.config.parallel import ParallelConfig, RecomputeConfig
from megatron_glmv.config.training import StageConfig
from megatron_glmv.plan.devices import Hardware
from megatron_glmv.plan.estimate import Plan, estimate
from megatron_glmv.plan.memory import stage_memory
from megatron_glmv.plan.rows import RowSample
from megatron_glmv.plan.timing import StageTimes

NEAREST_SPLITS = 3
"""Sizes of the first stage that are tried for each pipeline: those that even out the vision tower best."""
MOST_PIPELINE = 32
MOST_CONTEXT = 32
MOST_CHUNKS = 8
RECOMPUTE = (("none", "none"), ("none", "full"), ("full", "none"), ("full", "full"))
"""Of decoder and vision tower. Selective is not tried: fused attention keeps no scores, so it frees almost nothing."""
SEARCHED = ("tensor", "pipeline", "virtual_pipeline", "first_stage_layers", "last_stage_layers", "context", "vision",
            "distributed_optimizer")  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Layouts of a search.

    Attributes:
        best: plans that fit, the fastest first.
        tried: layouts that were planned.
        smallest: where none fits, the configuration that needs least memory.
    """

    best: tuple[Plan, ...]
    tried: int
    smallest: StageConfig | None


def search(
    config: StageConfig,
    gpus: int,
    hardware: Hardware,
    rows: RowSample,
    *,
    keep: int = 5,
    answer_tokens: float | None = None,
    align: int | None = None,
) -> Found:
    """Plan every layout and keep the fastest that fit.

    Args:
        config: the stage; its layout and recomputation are replaced.
        gpus: GPUs.
        hardware: what they are.
        rows: what rows are like.
        keep: plans to return.
        answer_tokens: as in `estimate`.
        align: that documents were packed to; context ranks cut them into twice as many pieces. None: any.
    """
    fitting: list[Plan] = []
    smallest: tuple[float, StageConfig] | None = None
    tried = 0
    for layout in layouts(config, gpus, hardware, rows, align):
        fits = 0
        for number, (text, vision) in enumerate(RECOMPUTE):
            # What is computed again only to free memory that nobody needs only costs time.
            if fits and number in (1, 3):
                break
            changed = _with(config, layout, text, vision)
            try:
                stages = stage_memory(changed, gpus, hardware, rows, answer_tokens=answer_tokens)
            except ConfigError:
                break
            tried += 1
            needed = max(stage.total for stage in stages)
            if needed <= hardware.memory_gb * 1e9:
                fits += 1
                plan = estimate(changed, gpus, hardware, rows, answer_tokens=answer_tokens, exact=False, stages=stages)
                fitting.append(plan)
            elif smallest is None or needed < smallest[0]:
                smallest = needed, changed
    chosen = sorted(fitting, key=_order)[: 2 * keep]
    exact = [estimate(p.config, gpus, hardware, rows, answer_tokens=answer_tokens) for p in chosen]
    best = tuple(sorted(exact, key=_order)[:keep])
    return Found(best, tried, smallest[1] if smallest and not best else None)


def _with(config: StageConfig, layout: ParallelConfig, text: Any, vision: Any) -> StageConfig:
    return config.model_copy(update={"parallel": layout, "recompute": RecomputeConfig(text=text, vision=vision)})


def _order(plan: Plan) -> tuple[float, ...]:
    """Fastest first; among layouts as good as equal, the one with less memory."""
    return (round(plan.step_s, 3), plan.memory)


def layouts(
    config: StageConfig, gpus: int, hardware: Hardware, rows: RowSample, align: int | None = None
) -> Iterator[ParallelConfig]:
    """Every layout that divides the GPUs and that the model admits."""
    shape = config.model.shape
    for tensor in _powers(hardware.gpus_per_node):
        for context in _powers(MOST_CONTEXT):
            if gpus % (tensor * context) or (align is not None and context > 1 and align % (2 * context)):
                continue
            for pipeline in range(1, min(MOST_PIPELINE, shape.text.num_layers + 1) + 1):
                if gpus % (tensor * context * pipeline):
                    continue
                for vision in ("tensor", "images") if tensor * context > 1 else ("tensor",):
                    cut = {"tensor": tensor, "context": context, "pipeline": pipeline, "vision": vision}
                    yield from _pipelines(config, cut, hardware, rows)


def _pipelines(config: StageConfig, cut: dict[str, Any], hardware: Hardware, rows: RowSample) -> Iterator[ParallelConfig]:
    """Even and uneven splits of one size of pipeline, plain and interleaved, checked against the model."""
    layers, pipeline = config.model.shape.text.num_layers, cut["pipeline"]
    own = config.parallel.model_dump() | dict.fromkeys(("first_stage_layers", "last_stage_layers"))
    own |= {**cut, "distributed_optimizer": True}
    wanted = wanted_layers(config, cut, hardware, rows) if pipeline > 1 else 0.0
    for chunks in range(1, (MOST_CHUNKS if pipeline > 1 else 1) + 1):
        splits = [None, *nearest_splits(layers, pipeline, chunks, wanted)] if pipeline > 1 else [None]
        for first in splits:
            try:
                layout = ParallelConfig.model_validate(own | {"virtual_pipeline": chunks, "first_stage_layers": first})
                layout.check_model(config.model.shape)
                if len(set(layout.stage_layers(layers))) == 1 and first is not None:
                    continue
                config.model_copy(update={"parallel": layout}).check()
            except ValueError:
                continue
            yield layout


def wanted_layers(config: StageConfig, cut: dict[str, Any], hardware: Hardware, rows: RowSample) -> float:
    """Layers of the first stage with which it would take as long as the last: it has the vision tower, the other the head.

    All stages but the first have equally many layers.
    """
    layers = config.model.shape.text.num_layers
    flat = ParallelConfig.model_validate({**cut, "pipeline": 1, "sequence": config.parallel.sequence})
    times = StageTimes(config.model_copy(update={"parallel": flat}), hardware, rows)
    one = _both(times.text, rows.mean_patches)
    tower, end = _both(times.vision, rows.mean_patches) / one, _both(times.last + times.head, rows.mean_patches) / one - 1
    return max(0.0, (layers + tower + (cut["pipeline"] - 1) * max(0.0, end)) / cut["pipeline"] - tower)


def nearest_splits(layers: int, pipeline: int, chunks: int, wanted: float) -> list[int]:
    """Possible layers of the first stage that come nearest to a number."""
    possible = [
        first
        for first in range(0 if chunks == 1 else chunks, layers, chunks)
        if (layers - first) % ((pipeline - 1) * chunks) == 0
    ]
    return sorted(possible, key=lambda first: abs(first - wanted))[:NEAREST_SPLITS]


def _both(seconds: Any, patches: float) -> float:
    return seconds.forward.of(patches) + seconds.backward.of(patches)


def _powers(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]


def changes(base: StageConfig, changed: StageConfig) -> dict[str, Any]:
    """Keys of layout and recomputation that differ, as overrides."""
    found: dict[str, Any] = {}
    for key in SEARCHED:
        old, new = getattr(base.parallel, key), getattr(changed.parallel, key)
        if old != new:
            found[f"parallel.{key}"] = new
    for key in ("text", "vision"):
        if getattr(base.recompute, key) != getattr(changed.recompute, key):
            found[f"recompute.{key}"] = getattr(changed.recompute, key)
    return found


def override_line(base: StageConfig, changed: StageConfig) -> str:
    """The differences as arguments that can be pasted behind the configuration file."""
    shown = {True: "true", False: "false", None: "null"}
    return " ".join(
        f"{key}={shown[value] if value is None or isinstance(value, bool) else value}"
        for key, value in changes(base, changed).items()
    )


def smallest_change(
    config: StageConfig, gpus: int, hardware: Hardware, rows: RowSample, *, answer_tokens: float | None = None
) -> Plan | None:
    """The plan that fits with the fewest keys changed, the fastest of these; None: no layout fits."""
    best: tuple[tuple[float, ...], Plan] | None = None
    for layout in [config.parallel, *layouts(config, gpus, hardware, rows)]:
        for text, vision in RECOMPUTE:
            changed = _with(config, layout, text, vision)
            count = len(changes(config, changed))
            if best is not None and count > best[0][0]:
                continue
            try:
                stages = stage_memory(changed, gpus, hardware, rows, answer_tokens=answer_tokens)
            except ConfigError:
                break
            if max(stage.total for stage in stages) > hardware.memory_gb * 1e9:
                continue
            plan = estimate(changed, gpus, hardware, rows, answer_tokens=answer_tokens, exact=False, stages=stages)
            if best is None or (count, plan.step_s) < best[0]:
                best = ((count, plan.step_s), plan)
    return best[1] if best is not None else None
