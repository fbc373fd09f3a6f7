"""A node is lost under torchrun with `--nnodes 1:2`: the other goes on with half the ranks, on the same batches."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.data.rows import write_rows
from tests.stages import REPOSITORY
from tests.training.runs import STEPS, config_file, events_of, steps_of, train, wait_for_step

LAYOUT = {"tensor": 1, "timeout_s": 120}


def start_agent(file: Path, port: int, log: Path) -> subprocess.Popen[str]:
    """One node's torchrun, with one rank."""
    words = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-id", "elastic"]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", "last_call_timeout=5"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words, "-m", "megatron_glmv", "train", str(file)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            # Each start gets a store of its own; docs/operations.md says why.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
        stdin=subprocess.DEVNULL,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_the_run_goes_on_with_the_nodes_that_are_left(tmp_path: Path) -> None:
    write_rows(tmp_path / "data", 23)
    code, output = train(config_file(tmp_path, "whole", tmp_path / "data", parallel=LAYOUT), 2)
    assert code == 0, output
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file, run = config_file(tmp_path, "run", tmp_path / "data", parallel=LAYOUT), tmp_path / "run"
    agents = [start_agent(file, port, tmp_path / f"agent_{number}.log") for number in range(2)]
    try:
        wait_for_step(run, 6, agents[0])
        assert events_of(run, "start")[-1]["ranks"] == 2
        # The first agent that came holds the rendezvous; the other's node dies, agent and rank together.
        host = next(number for number, agent in enumerate(agents) if listens(agent.pid, port))
        lost = psutil.Process(agents[1 - host].pid)
        for process in [lost, *lost.children(recursive=True)]:
            os.kill(process.pid, signal.SIGKILL)
        assert agents[host].wait(timeout=400) == 0, (tmp_path / f"agent_{host}.log").read_text()[-4000:]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    starts = events_of(run, "start")
    assert [event["ranks"] for event in starts] == [2, 1] and starts[1]["step"] >= 4
    reference, found = steps_of(tmp_path / "whole"), steps_of(run)
    assert len(found) == STEPS
    for step, (loss, _, tokens) in found.items():
        assert tokens == reference[step][2], "the same batches"
        assert loss == pytest.approx(reference[step][0], rel=1e-5)
    heartbeats = [json.loads(path.read_bytes().rstrip(b"\0 \n")) for path in (run / "ranks").glob("rank_*.json")]
    assert [beat["failure"] for beat in heartbeats] == ["finished"], "the lost rank's file is gone"


def listens(process: int, port: int) -> bool:
    return any(
        connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
        for connection in psutil.Process(process).net_connections("tcp")
    )
