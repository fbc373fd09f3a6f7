"""A closer look at a step, and a trace of it, in runs of the real command over gloo.

The norms are checked against the whole model's: parts add up to the global norm that the step reports, in one layout as in
another, and histograms count every trained parameter once.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_glmv.config.base import load
from megatron_glmv.config.count import count_parameters
from megatron_glmv.config.model import ModelConfig
from megatron_glmv.config.training import MetricsConfig, TrainConfig
from megatron_glmv.data.loader import RowStream
from megatron_glmv.plan.flops import forward_flops
from megatron_glmv.run_folder.metrics_file import read_metrics
from megatron_glmv.sequence.packed import PackedSequence
from megatron_glmv.training.recorder import Recorder
from tests.data.rows import LENGTH, write_rows
from tests.stages import start_stage

LAYOUTS = {"pipeline": ({"tensor": 1, "pipeline": 2}, 2), "tensor x data": ({"tensor": 2, "vision": "images"}, 4)}
HARDWARE = {"name": "slow", "fp32_tflops": 0.1, "memory_gb": 8, "memory_gbs": 10, "gpus_per_node": 2}


def run(folder: Path, data: Path, layout: dict[str, Any], ranks: int) -> Path:
    (folder / "hardware.yaml").write_text(json.dumps(HARDWARE), encoding="utf-8")
    tree: dict[str, Any] = {
        "run_folder": str(folder / "run"),
        "steps": 4,
        "global_batch_rows": 4,
        "model": {"preset": "digits", "init_std": 0.08},
        "parallel": {**layout, "timeout_s": 100},
        "precision": {"dtype": "fp32", "layers": "torch"},
        "data": {"sequence_length": LENGTH, "decode_threads": 1, "sources": [{"name": "rows", "path": str(data)}]},
        "optimizer": {"lr": 0.002, "clip_grad_norm": 0.1},
        "metrics": {"observe_every_steps": 2, "hardware": str(folder / "hardware.yaml")},
        "profile": {"first_step": 3, "steps": 2, "ranks": [1]},
    }
    file = folder / "run.yaml"
    file.write_text(json.dumps(tree), encoding="utf-8")
    process = start_stage("train", file, ranks)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return folder / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    data = tmp_path_factory.mktemp("rows")
    write_rows(data, 11)
    return {name: run(tmp_path_factory.mktemp(name), data, *layout) for name, layout in LAYOUTS.items()}


def looks(folder: Path) -> dict[int, dict[str, dict[str, float]]]:
    return {record["step"]: record["observed"] for record in read_metrics(folder / "metrics.jsonl") if "observed" in record}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_add_up_to_the_norm_of_the_step(runs: dict[str, Path], layout: str) -> None:
    reported = {r["step"]: r["grad_norm"] for r in read_metrics(runs[layout] / "metrics.jsonl") if "grad_norm" in r}
    found = looks(runs[layout])
    assert list(found) == [2, 4]
    for step, numbers in found.items():
        assert set(numbers["grad_norm"]) == {"vision", "merger", "text"}
        assert math.hypot(*numbers["grad_norm"].values()) == pytest.approx(reported[step], rel=1e-5)


def test_layouts_see_the_same_norms(runs: dict[str, Path]) -> None:
    one, other = (looks(runs[layout])[2] for layout in LAYOUTS)
    for name in ("weight_norm", "grad_norm"):
        assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_idle_time_and_memory_of_every_stage(runs: dict[str, Path]) -> None:
    piped, whole = looks(runs["pipeline"])[4], looks(runs["tensor x data"])[4]
    assert set(piped["stage_idle"]) == set(piped["memory_gb"]) == {"0", "1"}
    assert set(whole["stage_idle"]) == {"0"}
    # Two stages and four rows: whatever else happens, the last stage cannot begin before the first has sent.
    assert 0.02 < piped["stage_idle"]["1"] < 1
    assert all(0.1 < value < 24 for value in piped["memory_gb"].values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_histograms_count_every_parameter_once(runs: dict[str, Path], layout: str) -> None:
    board = EventAccumulator(str(runs[layout] / "tensorboard"), size_guidance={"histograms": 0})
    board.Reload()
    count = count_parameters(load(TrainConfig, [runs[layout] / "config.yaml"], []).model.shape)
    for part, number in (("vision", count.vision), ("merger", count.merger), ("text", count.text + count.head)):
        histogram = board.Histograms(f"weights/{part}")[-1].histogram_value
        assert histogram.num == number
        norm = looks(runs[layout])[4]["weight_norm"][part]
        # Values are taken to lie in the middle of bins an octave wide.
        assert histogram.sum_squares == pytest.approx(norm**2, rel=0.25)
        assert board.Histograms(f"gradients/{part}")[-1].histogram_value.num == number


def batch(folder: Path, step: int) -> Sequence[PackedSequence]:
    """The rows of one step, all replicas together."""
    config = load(TrainConfig, [folder.parent / "run.yaml"])
    stream = RowStream(
        config.data.sources,
        config.data,
        config.model.shape,
        seed=config.seed,
        global_batch_rows=config.global_batch_rows,
        data_rank=0,
        data_size=1,
        decode=False,
        align=1,
    )
    try:
        return stream.step(step).rows
    finally:
        stream.close()


def least_uneven(costs: Sequence[float]) -> float:
    """Costlier half over the mean, in the best of all divisions in two."""
    whole = sum(costs)
    sides = [sum(part) for size in range(len(costs) + 1) for part in combinations(costs, size)]
    return min(max(side, whole - side) for side in sides) * 2 / whole


def test_what_is_left_of_the_skew_is_reported(runs: dict[str, Path]) -> None:
    """Against the operations of the same rows (plan/flops.py), tried in every division; frames go largest first."""
    shape = ModelConfig(preset="digits").shape
    reported = [record["skew"] for record in read_metrics(runs["tensor x data"] / "metrics.jsonl") if "loss" in record]
    assert len(reported) == 4
    for step, skew in enumerate(reported):
        rows = batch(runs["tensor x data"], step)
        lengths = [[end - start for _, start, end in row.documents] for row in rows]
        frames = [[(int(high), int(wide)) for high, wide in row.frames.tolist()] for row in rows]
        padding = [len(row.tokens) - sum(length) for row, length in zip(rows, lengths, strict=True)]
        token = forward_flops(shape, [1], [], trained=0).text_linear
        costs = [
            forward_flops(shape, of, shown, row.num_trained).total + token * pad
            for row, of, shown, pad in zip(rows, lengths, frames, padding, strict=True)
        ]
        halves = [(costs[0] + costs[other]) * 2 / sum(costs) for other in (1, 2, 3)]
        assert skew["replicas"] == pytest.approx(min(max(half, 2 - half) for half in halves), abs=2e-3)
        each = [[forward_flops(shape, [], [frame]).total for frame in shown] for shown in frames if shown]
        weights = [sum(of) for of in each]
        best = sum(least_uneven(of) * weight for of, weight in zip(each, weights, strict=True)) / sum(weights)
        assert best - 1e-9 <= skew["frames"] <= 7 / 6 * best
    assert not any("skew" in record for record in read_metrics(runs["pipeline"] / "metrics.jsonl"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plan_stands_beside_the_measurement(runs: dict[str, Path], layout: str) -> None:
    """The same names in TensorBoard, and at both ends of the run; the plan itself has tests of its own."""
    planned = next(record["planned"] for record in read_metrics(runs[layout] / "metrics.jsonl") if "planned" in record)
    measured, drawn = (EventAccumulator(str(runs[layout] / "tensorboard" / where)).Reload() for where in ("", "planned"))
    assert set(drawn.Tags()["scalars"]) - set(measured.Tags()["scalars"]) <= {"train/mfu", "train/skew/replicas"}
    assert [(event.step, event.value) for event in drawn.Scalars("train/step_s")] == [
        (step, pytest.approx(planned["step_s"])) for step in (0, 4)
    ]
    assert list(planned["observed"]["memory_gb"]) == [str(stage) for stage in range(LAYOUTS[layout][0].get("pipeline", 1))]
    assert planned["tokens_per_s"] > 0 and 0 < planned["mfu"] < 1


def test_the_chosen_rank_leaves_a_trace(runs: dict[str, Path]) -> None:
    folder = runs["pipeline"] / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["rank_0001.steps_3_4.json.gz", "rank_0001.steps_3_4.txt"]
    with gzip.open(folder / "rank_0001.steps_3_4.json.gz", "rt") as file:
        events = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"aten::mm", "aten::_fused_adamw_"} & events
    assert "Self CPU" in (folder / "rank_0001.steps_3_4.txt").read_text(encoding="utf-8")


def test_weights_and_biases_follow_tensorboard(tmp_path: Path) -> None:
    """Needs the package, which the environment of the tests does not hold."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    config = MetricsConfig.model_validate({"wandb": {"project": "test", "mode": "offline"}})
    recorder = Recorder(tmp_path, config)
    recorder.write({"step": 1, "loss": 2.5}, "train")
    recorder.close()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert any(b"train/loss" in path.read_bytes() for path in folder.glob("*.wandb"))


def test_weights_and_biases_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from megatron_glmv.config.base import InputError

    monkeypatch.setitem(sys.modules, "wandb", None)
    config = MetricsConfig.model_validate({"wandb": {"project": "test"}})
    with pytest.raises(InputError, match="pip install wandb"):
        Recorder(tmp_path, config)
