"""What `glmv plan` expects of a run, under the names that the run reports what it measures."""

from __future__ import annotations

from typing import Any

from megatron_glmv.config.training import TrainConfig
from megatron_glmv.plan.devices import find_hardware, known_device
from megatron_glmv.plan.estimate import estimate
from megatron_glmv.plan.rows import RowAssumptions, sample_rows


def plan_run(config: TrainConfig, device_name: str, num_ranks: int) -> dict[str, Any]:
    """Plan the run as it is, on the rows of its own data sets.

    Args:
        config: the run's.
        device_name: product name of the devices.
        num_ranks: ranks of the whole run, a multiple of one replica.

    Returns:
        The means of a step under the keys of metrics.jsonl; memory is what torch allocates, the most of each stage. Empty where
        the device is not known and `metrics.hardware` does not describe it.

    Raises:
        ConfigError: the file of `metrics.hardware` cannot be read, or holds another key or an impossible number.
    """
    known, file = known_device(device_name), config.metrics.hardware
    if known is None and file is None:
        return {}
    hardware = find_hardware(known.name if known else "h100", file)
    plan = estimate(config, num_ranks, hardware, sample_rows(config, RowAssumptions()))
    idle = [1 - busy / plan.timeline.total for busy in plan.timeline.busy]
    allocated = [(stage.total - stage.overhead) / 1e9 for stage in plan.stages]
    return {
        "step_s": plan.step_s,
        "tokens_per_s": plan.tokens_s,
        "tflops_per_rank": plan.row_flops * plan.rows / plan.step_s / num_ranks / 1e12,
        "mfu": plan.mfu,
        "skew": {"replicas": plan.skew},
        "observed": {
            "memory_gb": {str(stage): value for stage, value in enumerate(allocated)},
            "stage_idle": {str(stage): value for stage, value in enumerate(idle)},
        },
    }
