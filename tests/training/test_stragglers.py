"""A rank that really computes more slowly, and one whose disk is slow, are named."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_glmv.config.base import load
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.training.stragglers import compare_ranks
from tests.data.rows import write_rows
from tests.ranks import run_ranks
from tests.training.runs import config_file

SLOW_DISK, SLOW_RANK = 0, 1
DELAY_S, DISK_DELAY_S = 0.4, 0.7
"""Of a forward pass, and of a row; rows are read ahead, so that only what exceeds the step is waited for."""


def test_ranks_are_compared_within_their_stage() -> None:
    found = compare_ranks([9.0, 9.0, 1.0, 2.0], [0.0, 0.5, 0.1, 0.0], [0, 0, 1, 1])
    assert (found["rank"], found["ratio"], found["compute_s"]) == (3, pytest.approx(2.0 / 1.5), 2.0)
    assert (found["waiting_rank"], found["wait_s"]) == (1, 0.5)


def run_slowly(rank: int, file: str) -> None:
    """Two replicas: one sleeps in a layer, the other's disk takes its time."""
    import torch

    from megatron_glmv.data.shard_reader import ShardReader
    from megatron_glmv.parallel import groups
    from megatron_glmv.run_folder.events import EventLog
    from megatron_glmv.training.command import open_run
    from megatron_glmv.training.job import Job
    from megatron_glmv.training.loop import train
    from megatron_glmv.training.stop import StopRequest
    from megatron_glmv.training.watchdog import Watchdog

    config = load(TrainConfig, [file])
    groups.initialize(config.parallel, config.seed)
    folder, rank = config.run_folder, torch.distributed.get_rank()
    if rank == SLOW_DISK:
        read = ShardReader.read

        def read_slowly(self: Any, *args: Any, **named: Any) -> Any:
            time.sleep(DISK_DELAY_S)
            return read(self, *args, **named)

        ShardReader.read = read_slowly  # type: ignore[method-assign]
    job = Job(Watchdog(folder, rank, 2, 60), StopRequest(folder, reads_file=False), EventLog(folder, reports=rank == 0))
    with open_run(config, job) as run:
        if rank == SLOW_RANK:
            run.assembly.models[0].register_forward_pre_hook(lambda module, inputs: time.sleep(DELAY_S))
        train(run)


def test_slow_ranks_are_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "data", 23)
    file = config_file(tmp_path, "run", tmp_path / "data", steps=4, parallel={"tensor": 1}, metrics={"ranks_every_steps": 4})
    run_ranks(run_slowly, 2, str(file), timeout_s=300)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    [(step, found)] = [(record["step"], record["ranks"]) for record in records if "ranks" in record]
    assert step == 4, "one step in four is measured"
    assert found["rank"] == SLOW_RANK and found["ratio"] > 1.2
    assert found["compute_s"] > 2 * DELAY_S, "two rows a step"
    assert found["waiting_rank"] == SLOW_DISK and found["wait_s"] > 0
    saves = [record["checkpoint"] for record in records if "checkpoint" in record]
    assert len(saves) == 1 and 0 < saves[0]["stall_s"] <= saves[0]["seconds"]
