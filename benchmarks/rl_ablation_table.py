"""What `rl_ablation.py` prints: curves over sampled answers read from metrics.jsonl, their table and their picture.

Answers are counted as prompts rolled out x group size, whether they were trained on or not. Between two evaluations curves are
straight lines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

from megatron_glmv.config.rl_stage import RlConfig
from megatron_glmv.run_folder.metrics_file import read_metrics

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

Floats = npt.NDArray[np.float64]

COLOURS = ("#2457c5", "#d97706", "#0f9d74", "#b42318", "#7a5af8", "#667085", "#0e7490", "#a21caf")
RISES = (0.5, 0.75)
"""Targets that are not given lie this far from the start to what the best arm ends at."""
WINDOW = 0.05
"""Share of the iterations that the useful groups are averaged over, in the picture only."""
MARKED = 30
"""Curves of no more points than these have their points marked."""


@dataclass(frozen=True)
class Curve:
    """What one run recorded; arrays of iterations and of evaluations.

    Attributes:
        steps: [n] iterations done.
        rollouts: [n] answers sampled until then.
        judged: [n] groups of the iteration that could be useful.
        useful: [n] those that were.
        chosen: [n] groups trained on.
        filled: [n] those that were not useful.
        seconds: [n] of the iteration, without evaluation and checkpoint.
        eval_steps: [m] iterations done.
        eval_rollouts: [m] answers sampled until then.
        domains: [m] of each, the held-out accuracy.
    """

    steps: Floats
    rollouts: Floats
    judged: Floats
    useful: Floats
    chosen: Floats
    filled: Floats
    seconds: Floats
    eval_steps: Floats
    eval_rollouts: Floats
    domains: Mapping[str, Floats]

    @property
    def accuracy(self) -> Floats:
        """[m] mean over domains."""
        return np.mean(list(self.domains.values()), axis=0)

    @property
    def num_rollouts(self) -> float:
        """Answers sampled so far."""
        return float(self.rollouts[-1]) if len(self.rollouts) else 0.0

    def describe(self) -> str:
        """Where it began and ended, in a few words."""
        return f"held-out accuracy {self.accuracy[0]:.1%} to {self.accuracy[-1]:.1%}, {self.num_rollouts:,.0f} rollouts"


def read_curve(path: Path, group_size: int) -> Curve:
    """Read a metrics.jsonl, whole or as far as it is.

    Args:
        path: of the file; nothing where there is none.
        group_size: answers to each prompt.
    """
    iterations, evaluations, sampled = [], list[tuple[float, float, dict[str, float]]](), 0.0
    for record in read_metrics(path):
        step = float(record["step"])
        if "eval" in record:
            accuracy = {name: value for name, value in record["eval"].get("accuracy", {}).items() if value is not None}
            evaluations.append((step, sampled, accuracy))
            continue
        if "expansion" not in record:
            continue
        groups = record["expansion"]
        sampled += groups["wave"] * group_size
        judged = groups["wave"] - groups["unjudged"]
        useful = judged - groups["degenerate"]
        iterations.append((step, sampled, judged, useful, groups["chosen"], groups["filled"], record["seconds"]["total"]))
    names = sorted(set.intersection(*(set(accuracy) for *_, accuracy in evaluations))) if evaluations else []
    evaluations = evaluations if names else []
    columns = np.array(iterations, dtype=np.float64).reshape(-1, 7).T
    steps, rollouts, judged, useful, chosen, filled, seconds = columns
    eval_steps, eval_rollouts = np.array([found[:2] for found in evaluations], dtype=np.float64).reshape(-1, 2).T
    domains = {name: np.array([found[name] for *_, found in evaluations]) for name in names}
    return Curve(steps, rollouts, judged, useful, chosen, filled, seconds, eval_steps, eval_rollouts, domains)


def reached(rollouts: Floats, accuracy: Floats, target: float, most: float) -> float | None:
    """Answers sampled when a curve first comes to `target`; None if it does not within `most`."""
    above = np.flatnonzero(accuracy >= target)
    if not len(above):
        return None
    place = int(above[0])
    if place == 0:
        return float(rollouts[0])
    low, high = accuracy[place - 1], accuracy[place]
    found = rollouts[place - 1] + (target - low) / (high - low) * (rollouts[place] - rollouts[place - 1])
    return float(found) if found <= most else None


@dataclass(frozen=True)
class Figure:
    """A number over seeds.

    Attributes:
        values: of every seed, None where there is none.
        mean: of those that have one.
        spread: their standard deviation (n - 1); None with fewer than two.
    """

    values: tuple[float | None, ...]
    mean: float | None
    spread: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Figure:
        """Describe values."""
        known = [value for value in values if value is not None]
        spread = float(np.std(known, ddof=1)) if len(known) > 1 else None
        return cls(tuple(values), float(np.mean(known)) if known else None, spread)

    def percent(self) -> str:
        """As a share."""
        spread = "" if self.spread is None else f" ± {self.spread * 100:.1f}"
        return "-" if self.mean is None else f"{self.mean:.1%}{spread}"

    def plain(self, digits: int = 0) -> str:
        """As a number; how many seeds have one, where not all do."""
        if self.mean is None:
            return "not reached"
        known = sum(value is not None for value in self.values)
        text = f"{self.mean:,.{digits}f}" + (f" ± {self.spread:,.{digits}f}" if self.spread is not None else "")
        return text + (f" ({known} of {len(self.values)})" if known < len(self.values) else "")


@dataclass(frozen=True)
class Row:
    """One arm.

    Attributes:
        seeds: that are done.
        iterations: until the common number of rollouts.
        useful: share of the judged groups rolled out until then.
        useful_trained: share of the groups trained on until then.
        accuracy: held out, mean over domains, at the common number.
        domains: held out, of each domain.
        targets: rollouts to each target.
        seconds: of an iteration.
    """

    seeds: tuple[int, ...]
    iterations: Figure
    useful: Figure
    useful_trained: Figure
    accuracy: Figure
    domains: Mapping[str, Figure]
    targets: tuple[Figure, ...]
    seconds: Figure


@dataclass(frozen=True)
class Comparison:
    """All arms.

    Attributes:
        rollouts: the common number, at which they are compared.
        start: held-out accuracy before the first iteration, mean over runs.
        targets: accuracies to reach.
        chosen: whether the targets were chosen from the curves.
        rows: by arm.
    """

    rollouts: float
    start: float
    targets: tuple[float, ...]
    chosen: bool
    rows: Mapping[str, Row]


def compare(curves: Mapping[str, Mapping[int, Curve]], budget: float, targets: Sequence[float] | None = None) -> Comparison:
    """The numbers of the table.

    Args:
        curves: by arm and seed; each with two evaluations or more.
        budget: sampled answers beyond which nothing counts.
        targets: accuracies to reach; None: chosen from the curves.
    """
    every = [curve for seeds in curves.values() for curve in seeds.values()]
    common = min(budget, *(float(curve.eval_rollouts[-1]) for curve in every))
    start = float(np.mean([curve.accuracy[0] for curve in every]))
    chosen = targets is None
    if targets is None:
        ends = [np.mean([_at(curve, curve.accuracy, common) for curve in seeds.values()]) for seeds in curves.values()]
        rise = float(max(ends)) - start
        targets = sorted({round(start + share * rise, 3) for share in RISES}) if rise > 0 else ()
    rows = {name: _row(seeds, common, targets) for name, seeds in curves.items()}
    return Comparison(common, start, tuple(targets), chosen, rows)


def _row(seeds: Mapping[int, Curve], common: float, targets: Sequence[float]) -> Row:
    curves = list(seeds.values())
    domains = sorted(set.intersection(*(set(curve.domains) for curve in curves)))
    masked = [(curve, curve.rollouts <= common * (1 + 1e-9)) for curve in curves]

    def shares(part: str, whole: str) -> Figure:
        pairs = [(getattr(curve, part)[mask].sum(), getattr(curve, whole)[mask].sum()) for curve, mask in masked]
        return Figure.of([float(count / total) if total else None for count, total in pairs])

    filled = shares("filled", "chosen")
    return Row(
        seeds=tuple(seeds),
        iterations=Figure.of([float(np.interp(common, [0, *curve.rollouts], [0, *curve.steps])) for curve in curves]),
        useful=shares("useful", "judged"),
        useful_trained=Figure.of([None if share is None else 1 - share for share in filled.values]),
        accuracy=Figure.of([_at(curve, curve.accuracy, common) for curve in curves]),
        domains={name: Figure.of([_at(curve, curve.domains[name], common) for curve in curves]) for name in domains},
        targets=tuple(
            Figure.of([reached(curve.eval_rollouts, curve.accuracy, target, common) for curve in curves]) for target in targets
        ),
        seconds=Figure.of([float(curve.seconds.mean()) for curve in curves]),
    )


def _at(curve: Curve, values: Floats, rollouts: float) -> float:
    return float(np.interp(rollouts, curve.eval_rollouts, values))


def write(
    result: Comparison,
    curves: Mapping[str, Mapping[int, Curve]],
    config: RlConfig,
    changes: Mapping[str, str],
    folder: Path,
) -> None:
    """Write ablation.md, ablation.json and ablation.png.

    Args:
        result: what is shown.
        curves: that it was made from, by arm and seed.
        config: what the arms share.
        changes: what each arm changes in it.
        folder: gets the files.
    """
    (folder / "ablation.md").write_text(markdown(result, config, changes), encoding="utf-8")
    points = {
        name: {
            seed: {"rollouts": curve.eval_rollouts.tolist(), "accuracy": curve.accuracy.tolist()}
            for seed, curve in seeds.items()
        }
        for name, seeds in curves.items()
    }
    tree = asdict(result) | {"changes": dict(changes), "curves": points}
    (folder / "ablation.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    draw(result, curves, folder / "ablation.png")


def markdown(result: Comparison, config: RlConfig, changes: Mapping[str, str]) -> str:
    """The table, and what must be known to read it."""
    rows, sampling, held_out = result.rows, config.sampling, config.evaluation
    domains = sorted(set().union(*(row.domains for row in rows.values())))
    heads = ["arm", "seeds", "iterations", "useful groups, rolled out", "useful groups, trained on", "accuracy", *domains]
    heads += [f"rollouts to {target:.1%}" for target in result.targets] + ["s / iteration"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, row in rows.items():
        cells = [name, str(len(row.seeds)), row.iterations.plain(1), row.useful.percent(), row.useful_trained.percent()]
        cells += [
            row.accuracy.percent(),
            *(row.domains[domain].percent() if domain in row.domains else "-" for domain in domains),
        ]
        cells += [*(figure.plain() for figure in row.targets), row.seconds.plain(2)]
        lines.append(f"| {' | '.join(cells)} |")
    origin = " and ".join(f"{share:.0%}" for share in RISES)
    targets = f"chosen from the curves, {origin} of the way from the start to the best arm" if result.chosen else "as given"
    notes = [
        f"Equal rollouts: all arms are compared at {result.rollouts:,.0f} sampled answers (prompts rolled out x "
        f"{sampling.group_size}), trained on or not; an iteration trains on {sampling.prompts_per_step} groups.",
        f"Accuracy: held out, {held_out.prompts} prompts x {held_out.answers} answers, mean over domains, then each; "
        f"{result.start:.1%} before the first iteration. ± is the standard deviation over seeds.",
        f'Rollouts to an accuracy: the first crossing of the mean over domains ({targets}); "not reached" within the common '
        "number. With (n of m), the mean is over the n seeds that reached it."
        if result.targets
        else "No arm rises above the start, so no accuracy to reach was chosen.",
        "Arms: " + "; ".join(f"{name}: {change or 'the file as it is'}" for name, change in changes.items()) + ".",
    ]
    if missing := sorted(set(changes) - set(rows)):
        notes.append(f"Not done, and left out: {', '.join(missing)}.")
    if config.optimizer.schedule != "constant" or config.optimizer.warmup_steps:
        notes.append("Learning rates follow iterations, so arms that make fewer of them are earlier in their schedule.")
    if "symmetric-clip" in changes and config.algorithm.updates_per_rollout == 1:
        notes.append(
            "With algorithm.updates_per_rollout 1 the ratio is 1 when the clip sees it: symmetric-clip changes nothing."
        )
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def draw(result: Comparison, curves: Mapping[str, Mapping[int, Curve]], path: Path) -> None:
    """Write the picture: accuracy over rollouts, useful groups over iterations; seeds thin, their mean thick."""
    most = result.rollouts * (1 + 1e-9)
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11,
                         "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.edgecolor": "#98a2b3"}):  # fmt: skip
        figure, axes = plt.subplots(1, 3, figsize=(18, 5.2), layout="constrained")
        for number, (name, found) in enumerate((name, list(seeds.values())) for name, seeds in curves.items() if seeds):
            colour = COLOURS[number % len(COLOURS)]
            grid = np.unique(np.concatenate([np.array([result.rollouts]), *(curve.eval_rollouts for curve in found)]))
            grid = grid[grid <= most]
            _plot(axes[0], grid, [np.interp(grid, curve.eval_rollouts, curve.accuracy) for curve in found], colour, name)
            steps = found[0].steps[: min(int(np.sum(curve.rollouts <= most)) for curve in found)]
            rolled = [curve.useful / np.maximum(curve.judged, 1) for curve in found]
            trained = [1 - curve.filled / np.maximum(curve.chosen, 1) for curve in found]
            for axis, shares in ((axes[1], rolled), (axes[2], trained)):
                if len(steps):
                    _plot(axis, steps, [_smooth(share[: len(steps)]) for share in shares], colour, name)
        for target in result.targets:
            axes[0].axhline(target, color="#667085", linewidth=0.8, linestyle=":")
        axes[0].set_title("held-out accuracy, mean over domains")
        axes[0].set_xlabel(f"sampled answers, up to the common {result.rollouts:,.0f}")
        axes[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        for axis, which in ((axes[1], "rolled out"), (axes[2], "trained on")):
            axis.set_title(f"useful share of the groups {which}")
            axis.set_xlabel(f"iterations within them (running mean of {WINDOW:.0%})")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in axes:
            axis.yaxis.set_major_formatter(PercentFormatter(1))
            axis.grid(axis="y", color="#eaecf0", linewidth=0.8)
        axes[0].legend(frameon=False, loc="lower right")
        figure.savefig(path, dpi=110, format="png")
        plt.close(figure)


def _plot(axis: Axes, places: Floats, values: Sequence[Floats], colour: str, name: str) -> None:
    marker = "o" if len(places) <= MARKED else ""
    if len(values) > 1:
        for own in values:
            axis.plot(places, own, color=colour, linewidth=0.7, alpha=0.45)
    axis.plot(places, np.mean(values, axis=0), color=colour, linewidth=2.2, marker=marker, markersize=4, label=name)


def _smooth(values: Floats) -> Floats:
    """Running mean over the last WINDOW of the values, fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - math.ceil(WINDOW * len(values)), 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
