"""The shipped batch file under a real SLURM: two nodes, training over gloo; ends, losses of nodes, preemption, time limits.

slurmctld and two slurmd run on this machine (`cluster.py`); the batch file is submitted as it is, with sizes on sbatch's
command line. Final losses are held, bit for bit, to a run of the same layout that nothing disturbs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_glmv import cli
from megatron_glmv.run_folder.events import read_events
from tests.data.rows import LENGTH, write_rows
from tests.rl.test_trainer import config_file as rl_config_file
from tests.slurm.cluster import Cluster, install_slurm
from tests.stages import REPOSITORY, start_stage

pytestmark = pytest.mark.slurm
BATCH = str(REPOSITORY / "examples" / "slurm" / "train.sbatch")
STEPS, EVERY = 30, 5
WAIT_S = 900


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = install_slurm(REPOSITORY / "tests" / "slurm.sh")
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="glmv-slurm-") as name:
        started = Cluster(Path(name))
        try:
            started.start()
            yield started
        finally:
            started.stop()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "rows", 23)
    return folder / "rows"


def config_file(folder: Path, data: Path, **changes: Any) -> Path:
    tree: dict[str, Any] = {
        "run_folder": "run",
        "steps": STEPS,
        "global_batch_rows": 4,
        "model": {"preset": "digits", "init_std": 0.08},
        "parallel": {"overlap": False, "timeout_s": 60},
        "precision": {"dtype": "fp32", "layers": "torch"},
        "data": {"sequence_length": LENGTH, "decode_threads": 1, "sources": [{"name": "rows", "path": str(data)}]},
        "optimizer": {"lr": 0.002, "warmup_steps": 4},
        "checkpoint": {"every_steps": EVERY, "keep": 100},
    }
    path = folder / "stage.yaml"
    path.write_text(yaml.safe_dump(tree | changes), encoding="utf-8")
    return path


def losses_of(run: Path) -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if (run / "metrics.jsonl").is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[int, float]:
    """Losses of the same two ranks on one machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start_stage("train", config_file(folder, data), 2, f"run_folder={folder / 'run'}")
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, output
    return losses_of(folder / "run")


def variables(**changes: str) -> dict[str, str]:
    """What a user sets before sbatch, with waits that suit two nodes."""
    found = {"GLMV_VENV": sys.prefix, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "GLMV_PREFLIGHT": "off"}
    return {**found, "GLMV_JOIN_S": "240", "GLMV_LAST_CALL_S": "3", **changes}


def submit(cluster: Cluster, folder: Path, *options: str, words: tuple[str, ...] = (), **changes: str) -> str:
    """Submit the batch file over both nodes; its options before, overrides of the stage behind."""
    options = ("--nodes=2", "--output=out.txt", *options)
    return cluster.submit(*options, BATCH, "stage.yaml", *words, folder=folder, environment=variables(**changes))


def output_of(folder: Path) -> str:
    texts = [folder / "out.txt", *sorted((folder / "run" / "logs").rglob("*.log")), *sorted((folder / "run").rglob("srun.txt"))]
    return "\n".join(
        f"=== {path}\n{path.read_text(encoding='utf-8', errors='replace')[-3000:]}" for path in texts if path.is_file()
    )


def wait_for_step(cluster: Cluster, job: str, folder: Path, step: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if max(losses_of(folder / "run"), default=0) >= step:
            return
        assert cluster.job(job).get("JobState") in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"), output_of(folder)
        time.sleep(0.1)
    raise AssertionError(f"step {step} was never reported\n{output_of(folder)}")


def test_stages_end_one_after_the_other_with_the_losses_of_one_machine(
    cluster: Cluster, tmp_path: Path, data: Path, undisturbed: dict[int, float]
) -> None:
    config_file(tmp_path, data)
    second = "stage.yaml run_folder=second steps=5 checkpoint.start_from=run"
    options = ("--nodes=2", "--output=out.txt", "--", "stage.yaml", f"--job-name=second -- {second}")
    first, second = cluster.submit_stages(*options, folder=tmp_path, environment=variables(GLMV_PREFLIGHT="--slow 0"))
    assert cluster.job(second)["Dependency"].startswith(f"afterok:{first}")
    cluster.wait_job(first, ["COMPLETED"], WAIT_S, lambda: output_of(tmp_path))
    assert losses_of(tmp_path / "run") == undisturbed
    assert "finished, 30 steps done" in (tmp_path / "out.txt").read_text(encoding="utf-8")
    [record] = (tmp_path / "run" / "environment").iterdir()
    assert {"commit", "command"} <= {
        line.split()[0] for line in record.read_text(encoding="utf-8").splitlines() if line.strip()
    }
    cluster.wait_job(second, ["COMPLETED"], WAIT_S, lambda: output_of(tmp_path))
    assert sorted(losses_of(tmp_path / "second")) == [1, 2, 3, 4, 5]


def test_a_node_killed_in_a_step_costs_nothing_when_it_comes_back(
    cluster: Cluster, tmp_path: Path, data: Path, undisturbed: dict[int, float]
) -> None:
    config_file(tmp_path, data)
    job = submit(cluster, tmp_path)
    wait_for_step(cluster, job, tmp_path, EVERY + 2)
    cluster.kill_node("n2")
    cluster.wait_job(job, ["PENDING"], WAIT_S, lambda: output_of(tmp_path))
    cluster.return_node("n2")
    found = cluster.wait_job(job, ["COMPLETED"], WAIT_S, lambda: output_of(tmp_path))
    assert int(found["Restarts"]) >= 1
    assert losses_of(tmp_path / "run") == undisturbed


def test_a_job_goes_on_without_a_node_where_it_may(
    cluster: Cluster, tmp_path: Path, data: Path, undisturbed: dict[int, float]
) -> None:
    config_file(tmp_path, data)
    job = submit(cluster, tmp_path, GLMV_MIN_NODES="1")
    wait_for_step(cluster, job, tmp_path, EVERY + 2)
    cluster.kill_node("n2")
    try:
        found = cluster.wait_job(job, ["COMPLETED"], WAIT_S, lambda: output_of(tmp_path))
    finally:
        cluster.return_node("n2")
    assert found["Restarts"] == "0"
    # Another data-parallel size adds the same gradients in another order (tests/training/test_run.py).
    assert losses_of(tmp_path / "run") == pytest.approx(undisturbed, rel=1e-5)


def test_a_preempted_job_saves_and_goes_on_later(
    cluster: Cluster, tmp_path: Path, data: Path, undisturbed: dict[int, float]
) -> None:
    config_file(tmp_path, data)
    job = submit(cluster, tmp_path)
    wait_for_step(cluster, job, tmp_path, 3)
    urgent = cluster.submit(
        "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1", folder=tmp_path
    )
    cluster.wait_job(urgent, ["COMPLETED"], WAIT_S, lambda: output_of(tmp_path))
    assert read_events(tmp_path / "run", ("stop",)), "the ranks did not save before they ended"
    found = cluster.wait_job(job, ["COMPLETED"], WAIT_S, lambda: output_of(tmp_path))
    assert found["Restarts"] == "1"
    assert losses_of(tmp_path / "run") == undisturbed


def test_a_job_requeues_itself_before_its_time_limit(
    cluster: Cluster, tmp_path: Path, data: Path, undisturbed: dict[int, float]
) -> None:
    config_file(tmp_path, data, parallel={"overlap": False, "timeout_s": 600})
    job = submit(cluster, tmp_path, "--time=60", "--signal=B:USR1@300")
    wait_for_step(cluster, job, tmp_path, 3)
    with frozen_ranks(tmp_path / "run"):  # so that the run is not over before SLURM looks at its clocks, every 30 s
        cluster.set_minutes_left(job, 3)
        wait_for_text(tmp_path / "out.txt", "USR1")
    cluster.wait_job(job, ["PENDING"], WAIT_S, lambda: output_of(tmp_path))
    assert read_events(tmp_path / "run", ("stop",)), "the ranks did not save before they ended"
    cluster.set_minutes_left(job, 60)
    found = cluster.wait_job(job, ["COMPLETED"], WAIT_S, lambda: output_of(tmp_path))
    assert found["Restarts"] == "1"
    assert losses_of(tmp_path / "run") == undisturbed


def test_tasks_of_an_array_run_and_are_requeued_by_themselves(cluster: Cluster, tmp_path: Path, data: Path) -> None:
    """The last task's id is the array's own, by which SLURM would answer for, and requeue, all tasks."""
    config_file(tmp_path, data)
    options = ("--array=1-2", "--nodes=1", "--output=out_%a.txt", BATCH, "stage.yaml", "run_folder=run_%a", "seed=%a")
    array = cluster.submit(*options, folder=tmp_path, environment=variables())

    def explain() -> str:
        return "\n".join(path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("out_*.txt")))

    tasks = {number: cluster.wait_job(f"{array}_{number}", ["RUNNING"], 60, explain) for number in (1, 2)}
    [last] = [number for number, found in tasks.items() if found["JobId"] == array]
    deadline = time.monotonic() + WAIT_S
    while max(losses_of(tmp_path / f"run_{last}"), default=0) < 3:
        assert cluster.job(f"{array}_{last}").get("JobState") == "RUNNING" and time.monotonic() < deadline, explain()
        time.sleep(0.1)
    cluster.signal_job(f"{array}_{last}", "TERM")
    ended = {number: cluster.wait_job(f"{array}_{number}", ["COMPLETED"], WAIT_S, explain) for number in tasks}
    assert {number: int(found["Restarts"]) for number, found in ended.items()} == {last: 1, 3 - last: 0}
    for number in tasks:
        assert sorted(losses_of(tmp_path / f"run_{number}")) == list(range(1, STEPS + 1))


@contextlib.contextmanager
def frozen_ranks(run: Path) -> Iterator[None]:
    """The ranks' processes, stopped for a while; time passes by them."""
    texts = [path.read_bytes().rstrip(b"\0 \n") for path in (run / "ranks").glob("rank_*.json")]
    processes = [json.loads(text)["process"] for text in texts]
    assert len(processes) == 2
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


def wait_for_text(file: Path, text: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while text not in file.read_text(encoding="utf-8"):
        assert time.monotonic() < deadline, file.read_text(encoding="utf-8")
        time.sleep(0.2)


def test_a_node_with_other_code_is_named_and_left_out(cluster: Cluster, tmp_path: Path, data: Path) -> None:
    shutil.copytree(
        REPOSITORY / "megatron_glmv", tmp_path / "other" / "megatron_glmv", ignore=shutil.ignore_patterns("__pycache__")
    )
    with (tmp_path / "other" / "megatron_glmv" / "__init__.py").open("a", encoding="utf-8") as file:
        file.write("# changed on one node\n")
    cluster.set_task_environment({"n2": {"PYTHONPATH": str(tmp_path / "other")}})
    config_file(tmp_path, data)
    try:
        job = submit(cluster, tmp_path, words=("steps=5",), GLMV_PREFLIGHT="--slow 0", GLMV_MIN_NODES="1")
        cluster.wait_job(job, ["COMPLETED"], WAIT_S, lambda: output_of(tmp_path))
    finally:
        cluster.set_task_environment({})
    output = (tmp_path / "out.txt").read_text(encoding="utf-8")
    [line] = [line for line in output.splitlines() if line.startswith("n2 ")]
    assert "megatron-glmv" in line
    assert "left out n2; 1 nodes are used" in output
    assert len(list((tmp_path / "run" / "ranks").glob("rank_*.json"))) == 1


@pytest.mark.slow
def test_a_dead_node_is_named_and_left_out(cluster: Cluster, tmp_path: Path, data: Path) -> None:
    config_file(tmp_path, data)
    held = submit(cluster, tmp_path, "--hold", words=("steps=5",), GLMV_PREFLIGHT="--slow 0", GLMV_MIN_NODES="1")
    cluster.kill_node("n2")
    try:
        cluster.release(held)
        cluster.wait_job(held, ["COMPLETED"], WAIT_S, lambda: output_of(tmp_path))
    finally:
        cluster.return_node("n2")
    assert "1 nodes are used" in (tmp_path / "out.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_stop_that_the_user_asks_for_is_not_requeued(cluster: Cluster, tmp_path: Path, data: Path) -> None:
    config_file(tmp_path, data)
    job = submit(cluster, tmp_path, "--nodes=1", words=("steps=100000",), GLMV_RANKS_PER_NODE="2")
    wait_for_step(cluster, job, tmp_path, 3)
    assert cli.main(["stop", str(tmp_path / "run")]) == 0
    found = cluster.wait_job(job, ["FAILED"], WAIT_S, lambda: output_of(tmp_path))
    assert (found["ExitCode"], found["Restarts"]) == ("3:0", "0")


@pytest.mark.slow
def test_a_launch_without_ranks_does_not_finish_a_run_that_an_earlier_one_finished(
    cluster: Cluster, tmp_path: Path, data: Path
) -> None:
    config_file(tmp_path, data)
    job = submit(cluster, tmp_path, "--nodes=1", words=("steps=5",))
    cluster.wait_job(job, ["COMPLETED"], WAIT_S, lambda: output_of(tmp_path))
    # torchrun does not take such a number of restarts.
    job = submit(cluster, tmp_path, "--nodes=1", words=("steps=10",), GLMV_MAX_RESTARTS="none", GLMV_GIVE_UP="2")
    cluster.wait_job(job, ["FAILED"], WAIT_S, lambda: output_of(tmp_path))
    assert "giving up: 2 launches" in (tmp_path / "out.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_that_makes_no_progress_is_given_up(cluster: Cluster, tmp_path: Path, data: Path) -> None:
    """A rank that dies before the first checkpoint of every attempt: its watchdog has no time to wait."""
    config_file(tmp_path, data, parallel={"overlap": False, "timeout_s": 0.2})
    job = submit(cluster, tmp_path, GLMV_MAX_RESTARTS="0", GLMV_GIVE_UP="2")
    cluster.wait_job(job, ["FAILED"], WAIT_S, lambda: output_of(tmp_path))
    assert "giving up: 2 launches" in (tmp_path / "out.txt").read_text(encoding="utf-8")
    assert "no progress for 0.2 s" in (tmp_path / "run" / "logs" / "errors.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_reinforcement_learning_has_servers_on_a_node_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    """The servers are a stand-in that answers as vLLM was seen to; where they run, and for how long, is SLURM's doing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine = {"kind": "vllm", "weights": {"kind": "disk", "folder": str(tmp_path / "served")}, "gap_alarm": None}
    engine["max_missing_share"] = 1.0  # the stand-in does not know pictures
    stage = rl_config_file(tmp_path, "run", steps=1, parallel={"timeout_s": 600}, engine=engine)
    changes = {"GLMV_SERVER_NODES": "1", "GLMV_SERVER_MODEL": str(tmp_path / "model"), "GLMV_SERVER_PORT": str(port)}
    changes |= {"VLLM": str(Path(__file__).with_name("fake_vllm_command.py"))}
    batch = BATCH.replace("train.sbatch", "rl.sbatch")
    job = cluster.submit("--nodes=2", "--output=out.txt", batch, str(stage), folder=tmp_path, environment=variables(**changes))
    cluster.wait_job(job, ["COMPLETED"], WAIT_S, lambda: output_of(tmp_path))
    [log] = (tmp_path / "run" / "logs").rglob("servers.0/n2.log")
    assert f"serving {tmp_path / 'model'} on 127.0.0.1:{port}" in log.read_text(encoding="utf-8")
    with socket.socket() as gone:
        assert gone.connect_ex(("127.0.0.1", port))
    assert [path.parent.parent.name for path in (tmp_path / "run" / "logs").rglob("agent.log")] == ["ranks.0"]


@pytest.mark.slow
def test_a_slow_node_is_named(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (sys.executable, "-m", "megatron_glmv", "preflight", str(tmp_path), "--among", "n1,n2", "--timeout-s", "600")
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with cluster.slowed("n2", 0.15):
        cluster.run_everywhere(*words, environment=environment, timeout_s=WAIT_S)
    assert cli.main(["preflight", str(tmp_path), "--judge", "n1,n2"]) == 0
    table = capsys.readouterr().out
    assert (tmp_path / "exclude.txt").read_text(encoding="utf-8") == "n2\n", table
    assert "matrix products at" in table
