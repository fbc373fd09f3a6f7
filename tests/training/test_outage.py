"""A run that ends because a server is down: its restarts try again, and it can go on until three launches have ended so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_glmv import cli
from megatron_glmv.config.base import InputError, validate
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.run_folder.events import read_events
from megatron_glmv.run_folder.refusal import Outage, read_refusal
from megatron_glmv.training.job import run_job
from tests.ranks import run_ranks

DOWN = "no server is left (http://127.0.0.1:8000: ConnectError); start them"


def start(rank: int, folder: str, launch: str, restart: int, kind: type[InputError]) -> tuple[bool, str]:
    """One start of a rank: whether it came to its work, and with which line it ended."""
    os.environ |= {"TORCHELASTIC_RUN_ID": launch, "TORCHELASTIC_RESTART_COUNT": str(restart)}
    tree: dict[str, Any] = {
        "run_folder": folder,
        "steps": 5,
        "global_batch_rows": 1,
        "model": {"preset": "digits"},
        "precision": {"dtype": "fp32", "layers": "torch"},
        "data": {"sequence_length": 64, "sources": [{"name": "rows", "path": folder}]},
    }
    worked = []

    def work(job: object) -> bool:
        worked.append(job)
        raise kind(DOWN)

    with pytest.raises(InputError) as found:
        run_job(validate(TrainConfig, tree), work)
    return bool(worked), str(found.value)


def exit_code(folder: Path) -> int:
    return cli.main(["status", str(folder), "--exit-code"])


def test_restarts_try_again_and_three_launches_give_up(tmp_path: Path) -> None:
    codes = []
    for launch in range(3):
        for restart in range(4):
            assert run_ranks(start, 1, str(tmp_path), f"job.{launch}", restart, Outage) == [(True, DOWN)]
            assert not read_refusal(tmp_path)
        codes.append(exit_code(tmp_path))
    assert codes == [3, 3, 1]
    faults = read_events(tmp_path, ("fault",))
    assert len(faults) == 3 and all(f"Outage: {DOWN}" in fault["text"] for fault in faults)


def test_what_no_restart_repairs_is_still_tried_once(tmp_path: Path) -> None:
    assert run_ranks(start, 1, str(tmp_path), "job", 0, InputError) == [(True, DOWN)]
    assert run_ranks(start, 1, str(tmp_path), "job", 1, InputError) == [(False, DOWN)]
    assert exit_code(tmp_path) == 1
