"""What ranks send in one step, and the seconds of it that no computation hides.

Source: the volumes of ring collectives; plan/timing.py (what passes send), plan/weights.py (what gradients and weights weigh).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_glmv.config.training import StageConfig
from megatron_glmv.plan.devices import Hardware
from megatron_glmv.plan.schedule import Timeline
from megatron_glmv.plan.timing import StageTimes, data_rate
from megatron_glmv.plan.weights import GRADIENT_BYTES, chunk_parameters, stage_parameters


@dataclass(frozen=True)
class Traffic:
    """Bytes that the busiest rank of each axis sends in one step."""

    tensor: float
    context: float
    pipeline: float
    data: float


def total_traffic(times: StageTimes, rows: int, patches: float, data: float) -> Traffic:
    """What one step sends.

    Args:
        times: of the layout.
        rows: of one replica.
        patches: of a mean row.
        data: bytes between replicas, of `data_traffic`.
    """
    layout = times.config.parallel
    sent = [times.sent(stage) for stage in range(layout.pipeline)]
    messages = 2 * layout.virtual_pipeline * times.message_bytes() if layout.pipeline > 1 else 0.0
    return Traffic(
        tensor=rows * max(each.tensor.of(patches) for each in sent),
        context=rows * max(each.context.of(patches) for each in sent),
        pipeline=rows * messages,
        data=data,
    )


def data_traffic(times: StageTimes, data: int, timeline: Timeline, patches: float) -> tuple[float, float]:
    """What replicas send each other in one step: gradients, and weights.

    Gradients of the first stage are sent while its last row's backward pass goes on; other stages are done earlier and send
    theirs meanwhile. With the distributed optimizer weights are gathered behind the next forward pass.

    Args:
        times: of the layout.
        data: data-parallel size.
        timeline: of one replica.
        patches: of a mean row.

    Returns:
        Seconds that nothing hides, and bytes that the busiest rank sends.
    """
    config, hardware, layout = times.config, times.hardware, times.config.parallel
    sharers = data * layout.context
    if sharers == 1:
        return 0.0, 0.0
    rate = data_rate(hardware, layout.tensor, sharers)
    element = 2 if config.precision.dtype == "bf16" else 4
    worst, most, gathered = 0.0, 0.0, 0.0
    for stage in range(layout.pipeline):
        moved = sum(p.elements for p in stage_parameters(config, stage) if p.learns) * (sharers - 1) / sharers
        gradients, weights = 4 * moved, (element if layout.distributed_optimizer else 4) * moved
        seconds = times.chunk(stage, 0)
        hides = layout.overlap and (stage == 0 or layout.virtual_pipeline > 1)
        reduced = _hidden(gradients / rate, seconds.backward.of(patches), hardware.overlap, hides)
        if layout.distributed_optimizer:
            gather = _hidden(weights / rate, seconds.forward.of(patches), hardware.overlap, layout.overlap)
            gathered = max(gathered, gather)
        else:
            reduced += weights / rate
        worst = max(worst, timeline.ends[stage] + reduced - timeline.total)
        most = max(most, gradients + weights)
    return max(0.0, worst) + gathered + _averaged(config, hardware), most


def _averaged(config: StageConfig, hardware: Hardware) -> float:
    """Seconds in which tensor ranks that encoded other frames average the vision tower's gradients, at the end of a step."""
    layout = config.parallel
    if layout.vision != "images" or layout.tensor == 1:
        return 0.0
    first = chunk_parameters(config.model, layout, 0)
    elements = sum(p.elements for p in first if p.learns and p.part != "text")
    return 2 * (layout.tensor - 1) / layout.tensor * GRADIENT_BYTES * elements / data_rate(hardware, 1, layout.tensor)


def _hidden(sending: float, computing: float, overlap: float, hides: bool) -> float:
    """What remains of sending beside computing."""
    return max(sending - computing * overlap, sending * (1 - overlap)) if hides else sending
