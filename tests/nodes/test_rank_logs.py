"""`glmv errors`: one page of the logs that torchrun itself leaves of a rank that raises and of one that is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_glmv import cli
from megatron_glmv.config.base import InputError
from megatron_glmv.nodes.rank_logs import summarize

FAILING = """
import os, signal, sys, time
if os.environ["LOCAL_RANK"] == "1":
    time.sleep(1)
    {act}
time.sleep(30)
"""


def run_torchrun(folder: Path, act: str) -> None:
    """Two ranks under an agent, with logs as examples/slurm/node.sh keeps them; the second rank acts."""
    script = folder / "script.py"
    script.write_text(FAILING.format(act=act), encoding="utf-8")
    node = folder / "logs" / "n1"
    node.mkdir(parents=True)
    words = ["--nnodes", "1", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    words += ["--redirects", "3", "--log-dir", str(node), str(script)]
    with (node / "agent.log").open("wb") as log:
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *words],
            check=False,
            stderr=log,
            timeout=200,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


@pytest.mark.parametrize(
    ("act", "needle"),
    [
        ("raise ValueError('a bad day')", "ValueError: a bad day"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9"),
    ],
    ids=["raises", "killed"],
)
def test_the_first_error_is_on_top(tmp_path: Path, act: str, needle: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_torchrun(tmp_path, act)
    assert cli.main(["errors", str(tmp_path / "logs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "node n1, local rank 1" in lines[0]
    assert needle in lines[1]


def log(folder: Path, rank: int, text: str, when: float) -> None:
    path = folder / "n1" / "id_x" / "attempt_0" / str(rank) / "stderr.log"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    os.utime(path, (when, when))


def test_a_rank_that_lost_another_is_not_first(tmp_path: Path) -> None:
    lost = "glmv: error: rank 0 lost contact at step 4 (forward and backward)\n"
    log(tmp_path, 0, lost, 100)
    log(tmp_path, 1, "Traceback (most recent call last):\n  File x\nRuntimeError: out of luck\n", 200)
    log(tmp_path, 2, "Traceback (most recent call last):\n  File y\nValueError: later\n", 300)
    log(tmp_path, 3, "only a warning\n", 50)
    lines = summarize(tmp_path).splitlines()
    assert "local rank 1" in lines[0]
    assert "RuntimeError: out of luck" in lines[1]
    assert [line.split(":")[0].split()[4] for line in lines if line.startswith("  node")] == ["2,", "0,"]
    assert "only a warning" not in summarize(tmp_path)


def test_no_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="RUN_FOLDER/logs"):
        summarize(tmp_path / "nothing")
