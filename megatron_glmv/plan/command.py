"""``glmv plan``: what a stage will need and take on so many GPUs, and which layouts do it best."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_glmv.config.base import ConfigError, InputError
from megatron_glmv.config.training import StageConfig, TrainConfig
from megatron_glmv.data.index import INDEX, read_index
from megatron_glmv.plan import report
from megatron_glmv.plan.activations import layer_spec
from megatron_glmv.plan.devices import Hardware, find_hardware
from megatron_glmv.plan.estimate import Plan, estimate, gpus_that_divide
from megatron_glmv.plan.rows import RowAssumptions, RowSample, sample_rows
from megatron_glmv.plan.search import Found, override_line, search, smallest_change

__all__ = ["PlanError", "PlanRequest", "RowAssumptions", "find_hardware", "run"]
MOST_REPLICAS_TRIED = 4096


class PlanError(InputError):
    """A stage that does not fit on the GPUs; the message says what is missing and the smallest change that fits."""


@dataclass(frozen=True)
class PlanRequest:
    """What the command line asks for.

    Attributes:
        config: the checked stage.
        hardware: of `find_hardware`.
        gpus: how many; None: the fewest on which the layout fits.
        layouts: how many layouts to propose.
        folders: packed data to measure rows from; empty: the configuration's own where it is on disk.
        assumed: what rows are like where nothing is measured.
        answer_tokens: of an answer in reinforcement learning.
        json_file: where to write the plan as JSON.
    """

    config: StageConfig
    hardware: Hardware
    gpus: int | None = None
    layouts: int = 5
    folders: Sequence[Path] = ()
    assumed: RowAssumptions = field(default_factory=RowAssumptions)
    answer_tokens: float | None = None
    json_file: Path | None = None


def run(request: PlanRequest) -> None:
    """Print the plan and the best layouts.

    Raises:
        ConfigError: a number of GPUs that the layout or the batch cannot use.
        PlanError: the layout does not fit.
    """
    config, hardware = request.config, request.hardware
    rows = sample_rows(config, request.assumed, request.folders, request.answer_tokens)
    gpus = request.gpus or _fewest(request, rows)
    try:
        plan = estimate(config, gpus, hardware, rows, answer_tokens=request.answer_tokens)
    except ConfigError as error:
        raise ConfigError(f"{error}; --gpus {gpus_that_divide(config, gpus)} can be used") from None
    print(report.describe(plan, rows, layer_spec(config)))
    found = Found((), 0, None)
    if request.layouts:
        align, answers = _align(request), request.answer_tokens
        found = search(config, gpus, hardware, rows, keep=request.layouts, answer_tokens=answers, align=align)
        print(report.list_layouts(config, found.best, found.tried))
    if request.json_file is not None:
        tree = {"plan": report.to_tree(plan, config), "layouts": [report.to_tree(best, config) for best in found.best]}
        request.json_file.write_text(json.dumps(tree | {"rows": rows.origin}, indent=1) + "\n", encoding="utf-8")
    if not plan.fits:
        raise PlanError(_does_not_fit(request, plan, rows))


def _fewest(request: PlanRequest, rows: RowSample) -> int:
    """The smallest number of GPUs on which the configured layout fits; one replica where none does."""
    config, replica = request.config, request.config.parallel.model_ranks
    most = config.global_batch_rows if isinstance(config, TrainConfig) else MOST_REPLICAS_TRIED
    first = 0
    for data in range(1, min(most, MOST_REPLICAS_TRIED) + 1):
        try:
            plan = estimate(config, replica * data, request.hardware, rows, answer_tokens=request.answer_tokens, exact=False)
        except ConfigError:
            continue
        first = first or replica * data
        if plan.fits:
            return replica * data
    return first or replica


def _align(request: PlanRequest) -> int | None:
    """What documents of all packed data that is here were rounded to; None: nothing is here."""
    folders = list(request.folders)
    if not folders and isinstance(request.config, TrainConfig):
        folders = [source.path for source in request.config.data.sources if (source.path / INDEX).is_file()]
    aligns = [read_index(folder).align for folder in folders]
    return min(aligns) if aligns else None


def _does_not_fit(request: PlanRequest, plan: Plan, rows: RowSample) -> str:
    config = request.config
    better = smallest_change(config, plan.gpus, request.hardware, rows, answer_tokens=request.answer_tokens)
    if better is not None:
        hint = f"the smallest change that fits: {override_line(config, better.config)} ({better.memory / 1e9:.1f} GB)"
    else:
        hint = f"no layout fits on {plan.gpus:,} GPUs; take more of them, GPUs with more memory, or shorter rows"
    return f"does not fit: {report.shortage(plan)}; {hint}"
