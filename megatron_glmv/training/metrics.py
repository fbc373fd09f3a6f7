"""What a run reports: metrics.jsonl, TensorBoard, the line on the terminal, and a picture of the loss.

One rank reports; every value it needs is equal on all ranks after a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from megatron_glmv.config.model import Part
from megatron_glmv.config.training import MetricsConfig
from megatron_glmv.run_folder.figures import format_count, format_duration, format_rate
from megatron_glmv.run_folder.metrics_file import read_metrics
from megatron_glmv.training.checkpoint_files import SaveReport
from megatron_glmv.training.observation import Observation
from megatron_glmv.training.recorder import Recorder, record_save

_SMOOTHING = 0.9
"""Share of the past in the seconds per step that the remaining time is reckoned with."""


@dataclass(frozen=True)
class StepMetrics:
    """What one step did, over all ranks."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean over the trained tokens of the global batch."""
    learning_rates: Mapping[Part, float]
    grad_norm: float
    """Before clipping; not finite when the step was skipped."""
    applied: bool
    trained_tokens: int
    useful_tokens: int
    """Tokens that are not padding."""
    total_tokens: int
    """Useful tokens and padding: rows x sequence length."""
    images: int
    seconds: float
    """From the end of the step before to the end of this one."""
    loader_wait_s: float
    """Of these, spent waiting for rows, on the slowest rank that was asked."""
    flops: Mapping[str, float] = field(default_factory=dict)
    """Floating-point operations that the model needs for this batch, forward and backward, by tower."""
    skew: Mapping[str, float] = field(default_factory=dict)
    """Work of the costliest replica, and of the ranks with the costliest frames, over the mean."""
    skipped_steps: int = 0
    """Steps of the whole run whose gradients were not finite."""
    bad_samples: int = 0
    """Samples of the whole run that could not be decoded."""


class MetricsWriter:
    """Reports one run; create it on one rank.

    Args:
        run_folder: gets metrics.jsonl and tensorboard/.
        config: what is reported and how often.
        total_steps: steps of the whole run.
        num_ranks: ranks that share the work, for TFLOP/s per rank.
        peak_tflops: dense peak of one device for MFU; None: no MFU.
        first_step: steps already done; what metrics.jsonl holds beyond them is cut off.
        stream: where the progress line goes; None: stderr.
    """

    def __init__(
        self,
        run_folder: Path,
        config: MetricsConfig,
        total_steps: int,
        *,
        num_ranks: int,
        peak_tflops: float | None,
        first_step: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self._every_steps = config.every_steps
        self._total_steps = total_steps
        self._num_ranks = num_ranks
        self._peak_tflops = peak_tflops
        self._interval: list[StepMetrics] = []
        self._step_seconds: float | None = None
        self._recorder = Recorder(run_folder, config, first_step, stream)

    def log_step(self, metrics: StepMetrics) -> None:
        """Take one step in; every `every_steps` steps, and at the last one, report the interval."""
        self._interval.append(metrics)
        past = self._step_seconds
        self._step_seconds = metrics.seconds if past is None else _SMOOTHING * past + (1 - _SMOOTHING) * metrics.seconds
        last = metrics.step >= self._total_steps
        if metrics.step % self._every_steps and not last and metrics.applied:
            return
        record = summarize(self._interval, self._num_ranks, self._peak_tflops)
        record["eta_s"] = (self._total_steps - metrics.step) * self._step_seconds
        self._interval.clear()
        self._recorder.write(record, "train")
        self._recorder.show(describe(record, self._total_steps), important=last or not metrics.applied)

    def log_plan(self, step: int, planned: Mapping[str, Any]) -> None:
        """Report what the plan expects of the steps after `step`."""
        self._recorder.expect(step, self._total_steps, planned, "train")
        memory = max(planned["observed"]["memory_gb"].values())
        self._recorder.note(
            f"planned: {planned['step_s']:.2f} s a step, {format_count(planned['tokens_per_s'])} useful tokens/s, "
            f"MFU {planned['mfu']:.1%}, at most {memory:.1f} GB a rank"
        )

    def log_evaluation(self, step: int, loss: float, tokens: int) -> None:
        """Report the loss on held-out rows after `step` steps."""
        self._recorder.write({"step": step, "eval_loss": loss, "eval_tokens": tokens}, "eval")
        self._recorder.note(f"step {step}/{self._total_steps} | eval loss {loss:.4f} over {format_count(tokens)} tokens")

    def log_observation(self, step: int, observation: Observation) -> None:
        """Report a closer look at `step`."""
        self._recorder.observe(step, observation)

    def note(self, text: str) -> None:
        """Print a line that stays: a checkpoint written, a sample that did not decode."""
        self._recorder.note(text)

    def log_ranks(self, step: int, ranks: Mapping[str, Any]) -> None:
        """Report a comparison of all ranks after `step` steps."""
        self._recorder.write({"step": step, "ranks": ranks}, "train")

    def log_save(self, save: SaveReport) -> None:
        """Report a checkpoint or a local copy that has become complete."""
        record_save(self._recorder, save, "train")

    def go_back(self, step: int) -> None:
        """Forget what was reported after `step`: the run has returned to a checkpoint."""
        self._interval.clear()
        self._recorder.go_back(step)

    def close(self) -> None:
        """Flush everything."""
        self._recorder.close()


def summarize(interval: list[StepMetrics], num_ranks: int, peak_tflops: float | None) -> dict[str, Any]:
    """One record for an interval of steps.

    Args:
        interval: consecutive steps, at least one.
        num_ranks: ranks that share the work.
        peak_tflops: dense peak of one device; None: no MFU.

    Returns:
        The loss per trained token over the applied steps, speeds per second over the interval, and the last step's values.
    """
    last = interval[-1]
    seconds = max(sum(m.seconds for m in interval), 1e-9)
    applied = [m for m in interval if m.applied and m.trained_tokens]
    tokens = sum(m.trained_tokens for m in applied)
    flops: dict[str, float] = {}
    for metrics in interval:
        for tower, count in metrics.flops.items():
            flops[tower] = flops.get(tower, 0.0) + count
    tflops = sum(flops.values()) / seconds / num_ranks / 1e12
    record: dict[str, Any] = {
        "step": last.step,
        "loss": sum(m.loss * m.trained_tokens for m in applied) / tokens if tokens else math.nan,
        "lr": dict(last.learning_rates),
        "grad_norm": last.grad_norm,
        "tokens_per_s": sum(m.useful_tokens for m in interval) / seconds,
        "images_per_s": sum(m.images for m in interval) / seconds,
        "useful_share": sum(m.useful_tokens for m in interval) / max(sum(m.total_tokens for m in interval), 1),
        "trained_tokens": sum(m.trained_tokens for m in interval),
        "step_s": seconds / len(interval),
        "loader_wait_s": sum(m.loader_wait_s for m in interval) / len(interval),
        "skipped_steps": last.skipped_steps,
        "bad_samples": last.bad_samples,
    }
    skews = {name: [m.skew[name] for m in interval if name in m.skew] for m in interval for name in m.skew}
    if skews:
        record["skew"] = {name: sum(values) / len(values) for name, values in skews.items()}
    if flops:
        record["tflops_per_rank"] = tflops
        record["flops_share"] = {tower: count / sum(flops.values()) for tower, count in flops.items()}
        if peak_tflops:
            record["mfu"] = tflops / peak_tflops
            record["mfu_by_tower"] = {tower: record["mfu"] * share for tower, share in record["flops_share"].items()}
    return record


def describe(record: Mapping[str, Any], total_steps: int) -> str:
    """A record of :func:`summarize` as the line that a person reads."""
    rates = record["lr"]
    rate = format_rate(rates["text"])
    if len(set(rates.values())) > 1:
        rate += " (" + ", ".join(f"{part} {format_rate(value)}" for part, value in rates.items() if part != "text") + ")"
    loss = f"loss {record['loss']:.4f}" if math.isfinite(record["loss"]) else "step skipped"
    parts = [
        f"step {record['step']}/{total_steps}",
        loss,
        f"lr {rate}",
        f"grad {record['grad_norm']:.2f}",
        f"{format_count(record['tokens_per_s'])} tok/s",
        f"{format_count(record['images_per_s'])} img/s",
        f"{record['useful_share']:.0%} useful",
    ]
    if "tflops_per_rank" in record:
        mfu = f" (MFU {record['mfu']:.1%})" if "mfu" in record else ""
        parts.append(f"{format_count(record['tflops_per_rank'] * 1e12, 'FLOP/s')}{mfu}")
    parts.append(f"{record['step_s']:.2f} s/step")
    if record["loader_wait_s"] > 0.05 * record["step_s"]:
        parts.append(f"waits {record['loader_wait_s']:.2f} s for rows")
    for key, word in (("skipped_steps", "skipped"), ("bad_samples", "bad samples")):
        if record[key]:
            parts.append(f"{record[key]} {word}")
    if "eta_s" in record:
        parts.append(f"{format_duration(record['eta_s'])} left")
    return " | ".join(parts)


def draw_loss(metrics: Path, png: Path) -> None:
    """Draw the training and evaluation loss of a metrics.jsonl.

    Raises:
        ValueError: there is no loss to draw.
    """
    records = list(read_metrics(metrics))
    curves = {
        "train": [(r["step"], r["loss"]) for r in records if r.get("loss") is not None],
        "eval": [(r["step"], r["eval_loss"]) for r in records if r.get("eval_loss") is not None],
    }
    if not any(curves.values()):
        raise ValueError(f"{metrics}: no loss to draw")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, style in (("train", {"linewidth": 1.0}), ("eval", {"marker": "o", "linewidth": 1.5})):
        if curves[name]:
            axes.plot(*zip(*curves[name], strict=True), label=name, **style)
    values = [value for curve in curves.values() for _, value in curve]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss per trained token")
    axes.grid(alpha=0.3)
    axes.legend()
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)
