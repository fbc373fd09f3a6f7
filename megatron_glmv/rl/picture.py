"""The curves of a run of reinforcement learning in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_glmv.rl.grading import TIERS
from megatron_glmv.run_folder.metrics_file import read_metrics

SMOOTHING = 0.8
"""Share of the past in the curves of rewards, which are noisy from one iteration to the next."""

Curves = dict[str, tuple[list[int], list[float]]]


def draw_curves(metrics: Path, png: Path) -> None:
    """Draw held-out accuracy, reward, the use of groups, tiers, entropy and time from a run's metrics.jsonl.

    Raises:
        ValueError: no iteration is recorded.
    """
    records = list(read_metrics(metrics))
    iterations = [record for record in records if "expansion" in record]
    if not iterations:
        raise ValueError(f"{metrics}: no iteration to draw")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), dpi=110, layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    held_out = [{"step": record["step"], **record["eval"]} for record in records if "eval" in record]
    _draw(axes[0], "held-out accuracy, sampled as in training", _by_key(held_out, "accuracy"), marker="o")
    _draw(axes[1], "reward (smoothed)", _smooth(_by_key(iterations, "reward")))
    expansion = _by_key(iterations, "expansion")
    use = {"useful groups": expansion["useful_share"], "ratio EMA": expansion["ratio_ema"]}
    _draw(axes[2], "useful groups; prompts rolled out per group of a batch", use)
    tiers = _by_key(iterations, "curriculum")
    _draw(axes[3], "active prompts by tier", {name: tiers[f"tier/{name}"] for name in TIERS if f"tier/{name}" in tiers})
    policy = _by_key([record for record in iterations if "policy" in record], "policy")
    _draw(axes[4], "policy (nats)", _smooth({name: policy[name] for name in ("entropy", "kl_old") if name in policy}))
    _draw(axes[5], "seconds", _smooth(_by_key(iterations, "seconds")))
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)


def _by_key(records: Sequence[Mapping[str, Any]], name: str) -> Curves:
    """One curve for each key of a record's tree `name`."""
    curves: Curves = {}
    for record in records:
        for key, value in record.get(name, {}).items():
            if value is not None:
                steps, values = curves.setdefault(key, ([], []))
                steps.append(record["step"])
                values.append(value)
    return curves


def _smooth(curves: Curves) -> Curves:
    """Exponential averages, corrected at the start."""
    smoothed: Curves = {}
    for name, (steps, values) in curves.items():
        average, weight, found = 0.0, 0.0, []
        for value in values:
            average, weight = SMOOTHING * average + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
            found.append(average / weight)
        smoothed[name] = steps, found
    return smoothed


def _draw(axes: Any, title: str, curves: Curves, marker: str | None = None) -> None:
    for name, (steps, values) in curves.items():
        axes.plot(steps, values, label=name, marker=marker, linewidth=1.3)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("iteration")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(fontsize=8)
