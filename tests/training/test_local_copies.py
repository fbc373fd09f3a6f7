"""Copies on the nodes' own disks: exact where every rank has its own, and the shared checkpoint where one does not."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_glmv.config.base import ConfigError, load
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.run_folder.checkpoint_folder import complete_folders
from megatron_glmv.training.state import TrainState
from tests.data.rows import write_rows
from tests.ranks import run_ranks
from tests.stages import start_stage
from tests.training.runs import (
    config_file,
    events_of,
    heartbeat_of,
    ranks_of,
    records_of,
    steps_of,
    train,
    wait_for_listening_ranks,
    wait_for_step,
)

LAYOUTS = {"tensor 2 x pipeline 2": {"tensor": 2, "pipeline": 2}, "data 4": {}}
DELAY_S = 0.5
KINDS = ((True, "fp32"), (True, "bf16"), (False, "bf16"))
"""Distributed optimizer, precision."""
SHARED, LOCAL = TrainState(step=1), TrainState(step=2, consumed_rows=8, left_out=(5,), losses=(3.0,))


def report_of(rank: int, folder: str) -> dict[str, Any]:
    """Every scenario in one spawn; what it found is checked outside."""
    from megatron_glmv.parallel import platform

    platform.activate()
    root, report = Path(folder), {}
    for number, layout in enumerate(LAYOUTS.values()):
        for kind in KINDS:
            report[number, *kind] = exact(root / f"{number}-{kind}", layout, *kind)
        report[number] = {name: passed_over(root / f"{number}-{name}", layout, spoil) for name, spoil in SPOILT.items()}
    report["older"] = older(root / "older")
    report["full"] = full_disk(root / "full")
    report["layout"] = another_layout(root / "layout")
    return report


def opened(run: Path, layout: dict[str, int], seed: int = 11, dropout: float = 0.0, **changes: Any) -> tuple[Any, Any]:
    from megatron_glmv.training.checkpoint import Checkpointer
    from tests.training.stock_gpt import Trainer, make_config

    config = make_config(run, layout, local_folder=str(run.with_name("disks")), **changes)
    trainer = Trainer.build(config, seed=seed, dropout=dropout)
    return trainer, Checkpointer(config, trainer.chunks, trainer.optimizer)


def begun(run: Path, layout: dict[str, int], **changes: Any) -> tuple[Any, Any]:
    """A run with a shared checkpoint of step 1 and local copies of step 2."""
    trainer, checkpointer = opened(run, layout, **changes)
    trainer.step(0)
    checkpointer.save(SHARED)
    trainer.step(1)
    checkpointer.save_local(LOCAL, {"more.json": {"a": 1}})
    return trainer, checkpointer


def copies_of(checkpointer: Any) -> list[int]:
    return checkpointer._copies._steps()


def exact(run: Path, layout: dict[str, int], distributed: bool, dtype: str) -> dict[str, Any]:
    kind = {"distributed_optimizer": distributed, "dtype": dtype, "dropout": 0.5}
    trainer, _ = begun(run, layout, **kind)
    weights = trainer.weights()
    unbroken = [trainer.step(step)[0] for step in range(2, 5)]
    trainer, checkpointer = opened(run, layout, seed=99, **kind)
    state = checkpointer.load_latest()
    same = all(torch.equal(a, b) for a, b in zip(weights, trainer.weights(), strict=True))
    resumed = [trainer.step(step)[0] for step in range(2, 5)]
    origin, extra = checkpointer.describe_origin(), (checkpointer.origin / "more.json").read_text()
    checkpointer.close()
    gone = copies_of(checkpointer)
    return {"state": state, "same": same, "losses": resumed == unbroken, "origin": origin, "extra": extra, "gone": gone}


def flip(copy: Path) -> None:
    data = bytearray((copy / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "state.pt").write_bytes(data)


SPOILT: dict[str, Callable[[Path], None]] = {
    "is not on its node": shutil.rmtree,
    "is damaged (state.pt is not what was written": flip,
    "is damaged (state.pt is missing": lambda copy: (copy / "state.pt").unlink(),
}
"""What the run says, and what is done to one rank's copy."""


def passed_over(run: Path, layout: dict[str, int], spoil: Callable[[Path], None]) -> dict[str, Any]:
    _, checkpointer = begun(run, layout)
    rank = torch.distributed.get_rank()
    if rank == 2:
        spoil(checkpointer._copies._folder(2))
    torch.distributed.barrier()
    trainer, checkpointer = opened(run, layout, seed=99)
    state = checkpointer.load_latest()
    loss, origin, left = trainer.step(1)[0], checkpointer.describe_origin(), copies_of(checkpointer)
    shutil.rmtree(run, ignore_errors=True)
    torch.distributed.barrier()
    _, checkpointer = opened(run, layout)
    return {"state": state, "loss": loss, "origin": origin, "left": left, "anew": checkpointer.load_latest()}


def older(run: Path) -> dict[str, Any]:
    """Two copies stay; one rank was slow, and then killed, in its save of the newest, so that all take the one before."""
    trainer, checkpointer = begun(run, {})
    for step in (2, 3):
        trainer.step(step)
        if step == 3 and torch.distributed.get_rank() == 1:
            save_slowly(checkpointer._copies)
        checkpointer.save_local(TrainState(step=step + 1))
    kept, saves = copies_of(checkpointer), checkpointer.take_reports()
    if torch.distributed.get_rank() == 1:
        folder = checkpointer._copies._folder(4)
        folder.rename(folder.with_name(folder.name + ".partial"))
    torch.distributed.barrier()
    _, checkpointer = opened(run, {}, seed=99)
    state, left = checkpointer.load_latest(), copies_of(checkpointer)
    # A shared checkpoint of a later step wins over them.
    checkpointer.save(TrainState(step=5))
    _, checkpointer = opened(run, {}, seed=99)
    later = checkpointer.load_latest(), checkpointer.describe_origin()
    return {"kept": kept, "saves": saves, "state": state, "left": left, "later": later}


def save_slowly(copies: Any) -> None:
    """Let the disk of this rank take its time."""
    save = copies.save

    def slow(*args: Any) -> None:
        time.sleep(DELAY_S)
        save(*args)

    copies.save = slow


def full_disk(run: Path) -> dict[str, Any]:
    """One node's disk refuses: the run goes on, and starts again from the shared checkpoint."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    _, checkpointer = opened(run, {})
    checkpointer.save(SHARED)
    if torch.distributed.get_rank() == 2:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))  # of which the log needs little
    checkpointer.save_local(LOCAL)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    torch.distributed.barrier()
    names = sorted(path.name for path in (run.with_name("disks")).glob(f"{run.name}-*/step_*/*"))
    torch.distributed.barrier()
    return {"names": names, "state": opened(run, {})[1].load_latest()}


def another_layout(run: Path) -> tuple[Any, str]:
    begun(run, {"tensor": 2, "pipeline": 2})
    _, checkpointer = opened(run, {"tensor": 2}, seed=99)
    return checkpointer.load_latest(), checkpointer.describe_origin()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_ranks(report_of, 4, str(tmp_path_factory.mktemp("runs")), timeout_s=400)


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=LAYOUTS)
@pytest.mark.parametrize(("distributed", "dtype"), KINDS)
def test_copies_continue_bit_for_bit(reports: list[dict[Any, Any]], number: int, distributed: bool, dtype: str) -> None:
    for rank, report in enumerate(reports):
        found = report[number, distributed, dtype]
        assert found["state"] == LOCAL
        assert found["same"] and found["losses"]
        assert found["origin"].endswith(f"step_00000002/rank_{rank:04d}") and "/disks/" in found["origin"]
        assert found["extra"] == '{"a": 1}'
        assert found["gone"] == [], "a run that has ended leaves the nodes' disks as they were"


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=LAYOUTS)
@pytest.mark.parametrize("said", SPOILT)
def test_one_ranks_missing_copy_sends_all_to_the_shared_checkpoint(
    reports: list[dict[Any, Any]], number: int, said: str
) -> None:
    found = [report[number][said] for report in reports]
    for one in found:
        assert one["state"] == SHARED and one["loss"] == found[0]["loss"]
        assert "checkpoints/step_00000001 (not from the local copies: rank 2" in one["origin"] and said in one["origin"]
        assert one["left"] == [], "copies of a course that was left are not found again"
        assert one["anew"] is None, "nor those of a run whose shared folder is gone"


def test_the_newest_copies_that_all_have_are_taken(reports: list[dict[Any, Any]]) -> None:
    for report in reports:
        found = report["older"]
        assert found["kept"] == [3, 4] and found["state"] == TrainState(step=3) and found["left"] == [3]
        _, *copies, newest = found["saves"]
        assert [(save.step, save.is_copy) for save in (*copies, newest)] == [(2, True), (3, True), (4, True)]
        assert newest.stall_s > DELAY_S and newest.stall_s == reports[0]["older"]["saves"][-1].stall_s, "the slowest rank's"
        state, origin = found["later"]
        assert state == TrainState(step=5) and origin.endswith("checkpoints/step_00000005")


def test_a_full_local_disk_costs_the_copy_alone(reports: list[dict[Any, Any]]) -> None:
    for report in reports:
        assert report["full"]["names"] == ["rank_0000", "rank_0001", "rank_0003"] and report["full"]["state"] == SHARED


def test_copies_of_another_layout_are_left_alone(reports: list[dict[Any, Any]]) -> None:
    for report in reports:
        state, origin = report["layout"]
        assert state == SHARED and "rank 0's of step 2 was written in another layout" in origin


def test_steps_without_a_folder_are_refused_in_one_line(tmp_path: Path) -> None:
    file = config_file(tmp_path, "run", tmp_path / "data")
    with pytest.raises(ConfigError, match=r"local_every_steps: needs local_folder") as caught:
        load(TrainConfig, [file], ["checkpoint.local_every_steps=5"])
    assert "\n" not in str(caught.value)


def test_a_run_whose_rank_is_killed_goes_on_from_local_copies(tmp_path: Path) -> None:
    write_rows(tmp_path / "data", 23)
    changes: dict[str, Any] = {"parallel": {"tensor": 1, "timeout_s": 60}, "steps": 40}
    assert train(config_file(tmp_path, "calm", tmp_path / "data", **changes), 2)[0] == 0
    keys = {"every_steps": 1000, "keep": 10, "local_folder": str(tmp_path / "disk"), "local_every_steps": 3}
    file, run = config_file(tmp_path, "run", tmp_path / "data", checkpoint=keys, **changes), tmp_path / "run"

    process = start_stage("train", file, 2)
    wait_for_step(run, 4, process)
    for one in [*ranks_of(process), process]:
        os.kill(one.pid, signal.SIGKILL)
    process.communicate()
    assert not complete_folders(run)
    process = start_stage("train", file, 2)
    os.kill(wait_for_listening_ranks(process, 2)[1].pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    [saved] = complete_folders(run)
    assert saved % 3 == 0 and f"stopped on request at step {saved}" in output, "where all nodes see it"

    process = start_stage("train", file, 2, "--restarts", "1")
    wait_for_step(run, saved + 4, process)
    os.kill(heartbeat_of(run, 1).process, signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    starts = events_of(run, "start")
    assert [event["step"] for event in starts[:3]] == [0, saved, saved] and len(starts) == 4
    assert starts[3]["step"] > saved and starts[3]["step"] % 3 == 0
    assert f"resuming {tmp_path}/disk/run-" in starts[3]["text"] in output
    assert steps_of(run) == steps_of(tmp_path / "calm")
    stalls = {record["step"]: record["local_copy"]["stall_s"] for record in records_of(run) if "local_copy" in record}
    assert list(stalls)[-3:] == [33, 36, 39] and all(stall > 0 for stall in stalls.values())
    assert list(complete_folders(run)) == [saved, 40]
    assert list((tmp_path / "disk").iterdir()) == []
