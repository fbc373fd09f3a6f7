"""What waits for a GPU runs here with the torch spec, as far as it goes: functions of ranks, scripts, the plan of a slice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gpu import test_fp8_on_device, test_hot_path, test_te_layers
from tests.ranks import REPOSITORY, run_ranks

FP32 = {"layers": "torch"}


def test_both_specs_are_compared_by_loss_gradients_and_logits(tmp_path: Path) -> None:
    found = run_ranks(test_te_layers.compare_specs, 1, str(tmp_path), {"one": FP32, "other": FP32})[0]
    loss, gradients, logits = found["one"]
    other_loss, other_gradients, other_logits = found["other"]
    assert loss == other_loss
    assert gradients.keys() == other_gradients.keys()
    assert all(bool(gradient.any()) for gradient in gradients.values())
    assert bool((logits == other_logits).all())


def test_a_leak_would_be_seen_in_what_changes(tmp_path: Path) -> None:
    found = run_ranks(test_te_layers.leak_through, 1, str(tmp_path), "torch")[0]
    assert found["own"] > 0.01
    assert found["own pixels"] > 1e-4
    assert found["words"] == found["pixels"] == 0


def test_losses_behind_a_checkpoint_are_those_of_the_run_that_wrote_it(tmp_path: Path) -> None:
    kept, resumed = run_ranks(test_te_layers.change_spec, 1, str(tmp_path), "torch", "torch")[0]
    assert resumed == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize("rows_kind", ["pictures", "language"])
def test_rows_of_the_hot_path(rows_kind: str, tmp_path: Path) -> None:
    assert run_ranks(test_hot_path.run_rows, 1, str(tmp_path), FP32, rows_kind)[0] == 8


def test_the_language_is_learned_from_the_same_rows(tmp_path: Path) -> None:
    curves = run_ranks(test_fp8_on_device.loss_curves, 1, str(tmp_path), {"one": {}, "other": {}}, 20, timeout_s=200)[0]
    assert curves["one"] == curves["other"]
    assert np.mean(curves["one"][-5:]) < 0.8 * curves["one"][0]


def test_features_move_in_training_and_come_back_with_the_weights(tmp_path: Path) -> None:
    stale, moved = run_ranks(test_fp8_on_device.fresh_copies, 1, str(tmp_path), {})[0]
    assert moved > 0.01
    assert stale == 0


def run_script(name: str, *arguments: str) -> list[list[str]]:
    """The rows of the table that a benchmark prints."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / name), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines[2:]]


def number(cell: str) -> float:
    return float(cell.replace(",", "").rstrip("%"))


def test_the_benchmark_of_mfu_trains_rows_of_both_kinds() -> None:
    pictures, text = run_script("gpu_mfu.py", "--quick", "--recipes", "off")
    assert (pictures[0], text[0]) == ("pictures", "text")
    assert number(pictures[4]) > 0
    assert number(text[4]) > 0


def test_the_benchmark_of_decoding_reads_what_it_trains_on() -> None:
    cpu = run_script("gpu_decode.py", "--quick")[0]
    assert cpu[0] == "cpu"
    assert number(cpu[1]) > 0
    assert number(cpu[3]) > 0


def test_the_slice_of_the_9b_is_planned_and_built_without_memory() -> None:
    found = run_script("gpu_mfu.py", "--dry-run", "--memory-gb", "85.5", "--recipes", "off", "current")
    sizes: list[Any] = [(row[0], row[1], int(row[2]), number(row[7])) for row in found]
    assert [size[:2] for size in sizes] == [(kind, recipe) for kind in ("pictures", "text") for recipe in ("off", "current")]
    assert all(layers >= 4 and 70 < memory_gb < 85.5 for _, _, layers, memory_gb in sizes)
