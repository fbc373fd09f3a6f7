"""Steps that go wrong on real ranks: no weight takes harm, the rank is named, and rows left out stay so in every start."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_glmv.config.base import load
from megatron_glmv.config.training import GuardConfig, TrainConfig
from megatron_glmv.run_folder.events import EventLog, read_events
from megatron_glmv.training.guard import Guard, GuardError
from megatron_glmv.training.state import TrainState
from tests.data.rows import write_rows
from tests.ranks import run_ranks
from tests.training.runs import config_file

CULPRIT, BATCH, STEPS = 1, 5, 10


def steady(window: int = 10, **config: Any) -> Guard:
    """A guard that has seen losses about 2 and norms about 1."""
    guard = Guard(GuardConfig(window=window, **config), TrainState())
    for step in range(window):
        guard.judge(2 + 0.01 * (-1) ** step, 1 + 0.1 * (-1) ** step, applied=True, finite=True)
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "found"),
    [
        (2.05, 1.2, ""),
        (1.0, 0.1, ""),
        (2.3, 1, "loss 2.3 over"),
        (math.nan, 1, "loss nan"),
        (2, 25, "gradient norm 25 over 20 x 1"),
    ],
)
def test_a_spike_is_far_above_the_usual(loss: float, norm: float, found: str) -> None:
    guard = steady(spike="skip")
    assert guard.find_spike(loss, norm).startswith(found) and bool(guard.find_spike(loss, norm)) == bool(found)


def test_nothing_is_a_spike_before_the_usual_is_known() -> None:
    guard = Guard(GuardConfig(spike="stop", window=8), TrainState(losses=(2.0,) * 7, grad_norms=(1.0,) * 7))
    assert not guard.find_spike(100, 100)
    assert not steady(spike="off").find_spike(100, 100)


def test_a_broken_run_is_ended() -> None:
    guard = steady(spike="skip", max_in_a_row=2)
    for _ in range(2):
        verdict = guard.judge(9, 1, applied=False, finite=True)
        assert verdict is not None and verdict.policy == "skip" and "loss 9 over" in verdict.reason
    with pytest.raises(GuardError, match=r"more than guard\.max_in_a_row 2 refused in a row"):
        guard.judge(9, 1, applied=False, finite=True)
    with pytest.raises(GuardError, match="gradients are not finite; the guard's policy is to stop"):
        steady(non_finite="stop").judge(2, math.nan, applied=False, finite=False)
    guard = steady(non_finite="rollback", max_in_a_row=2)
    for _ in range(2):
        guard.count_return(4)
    with pytest.raises(GuardError, match="back at step 4 for the 3th time"):
        guard.count_return(4)


def test_batches_that_are_left_out_are_jumped_over() -> None:
    state = TrainState(step=3, batch=3, left_out=(3, 4, 6))
    assert state.next_batch() == 5
    assert dataclasses.replace(state, batch=6).next_batch() == 7
    assert TrainState(step=4).batch == 4
    assert Guard(GuardConfig(rollback_batches=3), TrainState(left_out=(2,))).left_out_with(8) == (2, 6, 7, 8)


def run_all(rank: int, folder: str) -> dict[str, Any]:
    """Every scenario in one spawn, each in its own run folder."""
    return {name: scenario(Path(folder)) for name, scenario in SCENARIOS.items()}


def scenario_of(name: str, factor: float, overrides: tuple[str, ...], left_out: tuple[int, ...] = ()) -> Any:
    return lambda folder: train_with(folder, name, factor, overrides, left_out)


SCENARIOS = {
    "skip": scenario_of("skip", math.nan, ()),
    "rollback": scenario_of("rollback", math.nan, ("guard.non_finite=rollback",)),
    "left out": scenario_of("left_out", 1.0, (), (BATCH,)),
    "resumed": scenario_of("resumed", math.nan, ("guard.non_finite=rollback", f"steps={STEPS + 2}")),
    "unbroken": scenario_of("unbroken", 1.0, (f"steps={STEPS + 2}",), (BATCH,)),
    "spike": scenario_of("spike", 1e4, ("guard={spike: skip, window: 8}",)),
}


def train_with(folder: Path, name: str, factor: float, overrides: tuple[str, ...], left_out: tuple[int, ...]) -> dict[str, Any]:
    """A run in which one rank's gradients are multiplied whenever it meets one batch."""
    from megatron_glmv.parallel import groups
    from megatron_glmv.training.command import open_run
    from megatron_glmv.training.job import Job
    from megatron_glmv.training.loop import train
    from megatron_glmv.training.stop import StopRequest
    from megatron_glmv.training.watchdog import Watchdog

    run_folder = folder / ("rollback" if name == "resumed" else name)
    config = load(TrainConfig, [folder / "run.yaml"], [f"run_folder={run_folder}", "optimizer.schedule=constant", *overrides])
    if not torch.distributed.is_initialized():
        groups.initialize(config.parallel, config.seed)
    groups.seed_generators(config.seed)
    rank = torch.distributed.get_rank()
    job = Job(
        Watchdog(run_folder, rank, 2, 60), StopRequest(run_folder, reads_file=False), EventLog(run_folder, reports=not rank)
    )
    with open_run(config, job) as run:
        run.state.left_out = run.state.left_out or left_out
        bad = BATCH if name != "spike" else STEPS - 1
        parameter = next(iter(run.assembly.models[0].parameters()))
        if rank == CULPRIT and factor != 1.0:
            parameter.register_hook(lambda grad: grad * factor if run.state.next_batch() == bad else grad)
        train(run)
        weights = [value.detach().clone() for value in run.assembly.models[0].parameters()]
        return {
            "state": dataclasses.replace(run.state),
            "weights": weights,
            "events": read_events(run_folder, ("skip", "rollback")),
        }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("guard")
    write_rows(folder / "data", 23)
    config_file(folder, "run", folder / "data", steps=STEPS, parallel={"tensor": 1, "timeout_s": 60})
    return run_ranks(run_all, 2, str(folder), timeout_s=400)


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_rank_takes_harm(runs: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name]["weights"] for rank in runs)
    assert all(bool(value.isfinite().all()) for value in first)
    assert same(first, second)
    assert runs[0][name]["state"] == runs[1][name]["state"]


def test_a_skipped_step_names_the_rank(runs: list[dict[str, Any]]) -> None:
    found = runs[0]["skip"]
    [event] = found["events"]
    expected = "step 6, batch 5: gradients are not finite: those of rank 1 (tensor 0, pipeline 0, context 0, data 1); "
    assert event["text"].startswith(expected) and event["step"] == 6
    assert (found["state"].step, found["state"].skipped_steps, found["state"].batch) == (STEPS, 1, STEPS)


def test_a_rollback_is_as_if_the_rows_had_never_been_there(runs: list[dict[str, Any]]) -> None:
    found, expected = runs[0]["rollback"], runs[0]["left out"]
    [event] = found["events"]
    assert "rank 1" in event["text"] and "back to the checkpoint of step 4, batches left out: 5" in event["text"]
    assert found["state"] == expected["state"]
    assert found["state"].left_out == (BATCH,) and found["state"].batch == STEPS + 1
    assert same(found["weights"], expected["weights"])


def test_a_resume_leaves_out_the_same_rows(runs: list[dict[str, Any]]) -> None:
    assert len(runs[0]["resumed"]["events"]) == 1, "the resumed run has met nothing new"
    assert runs[0]["resumed"]["state"] == runs[0]["unbroken"]["state"]
    assert same(runs[0]["resumed"]["weights"], runs[0]["unbroken"]["weights"])


def test_a_spike_is_refused(runs: list[dict[str, Any]]) -> None:
    [event] = runs[0]["spike"]["events"]
    assert event["text"].startswith(f"step {STEPS}, batch {STEPS - 1}: gradient norm ") and "over 20 x" in event["text"]
    assert runs[0]["spike"]["state"].skipped_steps == 1
