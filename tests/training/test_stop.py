"""A run that is asked to stop, whose ranks die and are started again, or that no restart can repair: the real command line."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megatron_glmv import cli
from megatron_glmv.run_folder.checkpoint_folder import complete_folders
from megatron_glmv.run_folder.heartbeat import read_heartbeats
from megatron_glmv.training.stop import StopRequest
from tests.data.rows import write_rows
from tests.stages import start_stage
from tests.training.runs import (
    config_file,
    events_of,
    heartbeat_of,
    steps_of,
    wait_for_event,
    wait_for_listening_ranks,
    wait_for_step,
)

PARALLEL = {"tensor": 1, "timeout_s": 60}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder, 23)
    return folder


def test_a_second_launch_in_the_folder_of_one_that_runs_is_refused(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = tmp_path / "run", config_file(tmp_path, "run", data, parallel=PARALLEL, steps=100000)
    first = start_stage("train", file, 1)
    wait_for_step(run, 3, first)
    second = start_stage("train", file, 1, "steps=100", "--restarts", "1")
    refused, _ = second.communicate(timeout=200)
    assert second.returncode == 1, refused
    assert f"another launch runs there since {time.strftime('%Y')}" in refused
    assert f"process {heartbeat_of(run, 0).process}, is at step" in refused
    assert cli.main(["status", str(run), "--exit-code"]) == 3
    assert "running, 1 ranks" in capsys.readouterr().out
    assert cli.main(["stop", str(run)]) == 0
    output, _ = first.communicate(timeout=200)
    assert first.returncode == 0, output
    assert len(events_of(run, "start")) == 1 and not events_of(run, "fault")
    assert list(complete_folders(run))[-1] == max(steps_of(run)) == len(steps_of(run))


def test_ranks_start_again_and_a_run_stops_on_request(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run: a killed rank, `glmv stop` while it starts again, a left-over request, and a signal to one rank."""
    run, file = tmp_path / "run", config_file(tmp_path, "run", data, parallel=PARALLEL, steps=100000)
    process = start_stage("train", file, 2, "--restarts", "1")
    wait_for_step(run, 6, process)
    assert cli.main(["status", str(run), "--exit-code"]) == 3  # it runs
    os.kill(heartbeat_of(run, 1).process, signal.SIGKILL)
    wait_for_event(run, "start", 2, process)
    assert cli.main(["stop", str(run)]) == 0
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    [fault] = events_of(run, "fault")
    assert "rank 1 on " in fault["text"] and "was killed at step" in fault["text"]
    [stop] = events_of(run, "stop")
    assert list(complete_folders(run))[-1] == stop["step"] == max(steps_of(run))
    assert [beat.failure for beat in read_heartbeats(run)] == ["stopped"] * 2
    assert not (run / "stop").exists()
    capsys.readouterr()
    assert cli.main(["status", str(run), "--exit-code"]) == 3
    said = capsys.readouterr().out
    assert "stopped on request" in said and "restarts    1; the last began at step 4" in said and "faults      1;" in said
    assert cli.main(["stop", str(run)]) == 1
    assert "nothing runs there (it is stopped)" in capsys.readouterr().err

    (run / "stop").touch()
    os.utime(run / "stop", (time.time() - 60, time.time() - 60))
    process = start_stage("train", file, 2)
    wait_for_step(run, stop["step"] + 2, process)
    os.kill(heartbeat_of(run, 1).process, signal.SIGUSR1)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "a request from before this start" in output
    assert events_of(run, "stop")[1]["step"] == list(complete_folders(run))[-1] > stop["step"] + 1
    assert len(events_of(run, "fault")) == 1


def test_the_launcher_passes_a_request_on_and_ends_the_ranks_at_a_second(tmp_path: Path, data: Path) -> None:
    run, file = tmp_path / "run", config_file(tmp_path, "run", data, parallel=PARALLEL, steps=100000)
    process = start_stage("train", file, 2)
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "glmv: SIGTERM: the ranks save and end" in output and "Traceback" not in output
    [stop] = events_of(run, "stop")
    assert list(complete_folders(run))[-1] == stop["step"] == max(steps_of(run))
    assert [beat.failure for beat in read_heartbeats(run)] == ["stopped"] * 2
    assert not (run / "stop").exists()

    process = start_stage("train", file, 2)
    wait_for_step(run, stop["step"] + 2, process)
    ranks = [heartbeat_of(run, rank).process for rank in range(2)]
    os.kill(ranks[1], signal.SIGSTOP)  # so that no rank comes to the end of its step
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert output.splitlines()[-1].startswith("glmv: error: ranks ended by SIGTERM") and "Traceback" not in output
    assert not any(psutil.pid_exists(rank) and psutil.Process(rank).status() != psutil.STATUS_ZOMBIE for rank in ranks)


@pytest.mark.parametrize("to_launcher", [False, True], ids=["a rank", "the launcher"])
def test_a_request_during_the_start_is_answered_before_the_first_step(tmp_path: Path, data: Path, to_launcher: bool) -> None:
    run = tmp_path / "run"
    process = start_stage("train", config_file(tmp_path, "run", data, parallel=PARALLEL, steps=100000), 2)
    ranks = wait_for_listening_ranks(process, 2)
    os.kill(process.pid if to_launcher else ranks[1].pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and "Traceback" not in output, output
    [stop] = events_of(run, "stop")
    assert stop["step"] == 0 and "stopped on request at step 0" in stop["text"] and "begins anew" in stop["text"]
    assert [beat.failure for beat in read_heartbeats(run)] == ["stopped"] * 2
    assert not (run / "metrics.jsonl").exists() and not complete_folders(run) and not (run / "stop").exists()
    assert cli.main(["status", str(run), "--exit-code"]) == 3


def test_what_no_restart_repairs_is_tried_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "data", 6)
    shard = min((tmp_path / "data").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    file = config_file(tmp_path, "run", tmp_path / "data", parallel=PARALLEL)
    process = start_stage("train", file, 1, "--restarts", "1")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1, output
    lines = [line for line in output.splitlines() if line.startswith("glmv: error:")]
    assert len(lines) == 2 and len(set(lines)) == 1 and shard.name in lines[0], "each start says the same"
    assert "Traceback" not in output
    assert len(events_of(tmp_path / "run", "start")) <= 1, "the second did not even join"
    assert cli.main(["status", str(tmp_path / "run"), "--exit-code"]) == 1
    assert f"cannot go on: {lines[0].partition('rank 0: ')[2]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("restarts", "age_s", "stays"),
    [(0, 60, False), (0, -60, True), (1, 60, True)],
    ids=["left over", "just asked", "restarted"],
)
def test_a_request_from_before_the_launch_is_not_for_it(tmp_path: Path, restarts: int, age_s: float, stays: bool) -> None:
    (tmp_path / "stop").touch()
    os.utime(tmp_path / "stop", (time.time() - age_s - 3600, time.time() - age_s - 3600) if age_s > 0 else None)
    request = StopRequest(tmp_path, reads_file=True, restarts=restarts)
    assert bool(request.leave_out_earlier()) != stays
    assert request.is_requested() == stays
    assert not StopRequest(tmp_path, reads_file=False).is_requested()
