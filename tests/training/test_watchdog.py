"""Hangs, deaths and failures of one of several real ranks: the others end in time and say who and where."""

from __future__ import annotations

import concurrent.futures
import ctypes
import datetime as dt
import json
import os
import re
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d

from megatron_glmv.run_folder.events import read_events
from megatron_glmv.run_folder.heartbeat import own_heartbeat
from megatron_glmv.training.hang_report import compose_report, first_behind, recent_collectives, save_report, words_path
from megatron_glmv.training.watchdog import EXIT_CODE, Watchdog, collective_timeout_s
from tests.ranks import Outcome, watch_ranks

TIMEOUT_S, CULPRIT, FATAL_STEP = 5.0, 1, 3
PLACES = ("tensor 0, pipeline 0, context 0, data 0", "tensor 0, pipeline 0, context 0, data 1")


def run(rank: int, folder: str, fault: str) -> None:
    """A loop of collectives in which one rank meets a fault; what the main program does about it is shown here too."""
    timeout = dt.timedelta(seconds=collective_timeout_s(TIMEOUT_S))
    dist.init_process_group("gloo", timeout=timeout)
    watchdog = Watchdog(Path(folder), rank, dist.get_world_size(), TIMEOUT_S, coordinates=PLACES[rank % 2])
    dist.barrier()
    watchdog.start()
    try:
        for step in range(1, 6):
            watchdog.beat(step, "rows")
            watchdog.rows = [f"books/row-{step}-{rank}-{number}" for number in range(2)]
            if step == FATAL_STEP and rank == CULPRIT:
                meet(fault)
            watchdog.beat(step, "update")
            for number, key in enumerate(watchdog.rows, 1):
                watchdog.begin_row(number, 2, key)
                if (step, rank, number, fault) == (FATAL_STEP, CULPRIT, 1, "hangs in its first row"):
                    time.sleep(600)
            dist.all_reduce(torch.ones(1))
    except Exception as error:  # noqa: BLE001
        print("REPORT", watchdog.describe_failure(error), flush=True)
        os._exit(3)
    watchdog.stop()


def meet(fault: str) -> None:
    if fault == "sleeps":
        time.sleep(600)
    elif fault == "holds the interpreter":
        ctypes.PyDLL(None).sleep(600)  # a PyDLL call does not release the interpreter lock
    elif fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "raises":
        raise ValueError("row 7 is longer than 64 tokens")


FAULTS = {
    "sleeps": 2,
    "hangs in its first row": 2,
    "holds the interpreter": 2,
    "killed": 3,
    "frozen": 2,
    "raises": 2,
    "none": 2,
}
"""Ranks of each run."""


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Outcome]]]:
    """Every fault in a run of its own, three at a time: they mostly wait."""
    folders = {fault: tmp_path_factory.mktemp(fault.replace(" ", "_")) for fault in FAULTS}
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        runs = {
            # A frozen rank does not end by itself; the launcher kills it when the others have.
            fault: pool.submit(
                watch_ranks, run, ranks, str(folders[fault]), fault, timeout_s=400.0, stop_on_failure=fault == "frozen"
            )
            for fault, ranks in FAULTS.items()
        }
        return {fault: (folders[fault], future.result()) for fault, future in runs.items()}


def text(outcomes: list[Outcome]) -> str:
    return "\n".join(outcome.output for outcome in outcomes)


@pytest.mark.parametrize("fault", ["sleeps", "holds the interpreter", "frozen"])
def test_a_hang_is_reported_once_and_ends_the_others(endings: dict[str, tuple[Path, list[Outcome]]], fault: str) -> None:
    folder, outcomes = endings[fault]
    others = [outcome for outcome in outcomes if outcome.rank != CULPRIT]
    assert all(outcome.exit_code in (EXIT_CODE, 3) for outcome in others), text(outcomes)
    if fault != "frozen":  # a stopped process is left to the launcher
        assert outcomes[CULPRIT].exit_code in (-signal.SIGALRM, EXIT_CODE)
    expected = "no progress for 5 s: rank 1 is at step 3 (rows) while the others are at step 3 (update)"
    report = report_of(folder)
    lines = [line for line in text(outcomes).splitlines() if line.startswith("no progress")]
    assert len(lines) == 1, text(outcomes)
    assert lines[0].startswith(expected)
    assert lines[0].endswith("hangs/hang_0001.txt")
    assert report.startswith(expected)
    [event] = read_events(folder, ("hang",))
    assert event["text"] == lines[0]
    assert f"First behind: rank 1 ({PLACES[1]}) on {socket.gethostname()}, process " in report
    # The rank that waits was stopped in the collective that the other has not entered, by its own stacks and by torch's record.
    waiting = report.partition("# rank 0:")[2].partition("# rank ")[0]
    assert re.search(r"test_watchdog\.py.* in run", waiting)
    assert "rows of the step: books/row-3-0-0, books/row-3-0-1" in waiting
    assert re.search(r"gloo:all_reduce no\. \d+ in 0 default_pg, sizes \[\[1\]\]", waiting)
    if fault == "sleeps":
        assert re.search(r"Group 0 default_pg, collective \d+ \(gloo:all_reduce\) was entered by rank 0; rank 1 at \d+", report)
    if fault == "frozen":
        assert "(stopped by a signal)" in report and "did not answer; try py-spy dump there" in report
    else:
        assert re.search(r"test_watchdog\.py.* in meet", report.partition("# rank 1:")[2])


def report_of(folder: Path) -> str:
    return (folder / "hangs" / "hang_0001.txt").read_text()


def test_a_rank_is_behind_in_its_micro_batches(endings: dict[str, tuple[Path, list[Outcome]]]) -> None:
    report = report_of(endings["hangs in its first row"][0])
    assert report.startswith("no progress for 5 s: rank 1 is at step 3 (update) while the others are at step 3 (update)")
    assert "step 3 (update), in micro-batch 1 of 2, row books/row-3-1-0" in report


def test_reports_are_kept_by_number(tmp_path: Path) -> None:
    for number in range(1, 25):
        assert save_report(tmp_path, "text").name == f"hang_{number:04d}.txt"
    assert sorted(path.name for path in (tmp_path / "hangs").iterdir()) == [f"hang_{n:04d}.txt" for n in range(5, 25)]


def recorded(name: str, created_ns: int, number: int, retired: bool = True) -> dict[str, object]:
    """An entry as torch 2.13's recorders write it, as far as it is read."""
    return {
        "process_group": ["0", "default_pg"],
        "profiling_name": name,
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "is_p2p": False,
        "input_sizes": [[1]],
        "retired": retired,
        "time_created_ns": created_ns,
    }


def test_collectives_of_nccl_and_gloo_are_read_where_torch_has_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins at the recorders' edge: a build for CUDA keeps them apart, and no GPU is here."""
    gloo = [recorded("gloo:all_reduce", 1000 + 10 * number, number) for number in range(1, 101)]
    nccl = [recorded("nccl:all_gather", 1985, 7), recorded("nccl:reduce_scatter", 2005, 8, retired=False), gloo[-1]]
    monkeypatch.setattr(_distributed_c10d, "_dump_fr_trace_json", lambda *_: json.dumps({"entries": gloo}).encode())
    monkeypatch.setattr(
        _distributed_c10d, "_dump_nccl_trace_json", lambda *_: json.dumps({"entries": nccl}).encode(), raising=False
    )
    found = recent_collectives()
    assert [(entry["name"], entry["number"]) for entry in found[-4:]] == [
        ("nccl:all_gather", 7),
        ("gloo:all_reduce", 99),
        ("gloo:all_reduce", 100),
        ("nccl:reduce_scatter", 8),
    ]
    assert not found[-1]["done"] and len(found) == 52

    def refuse(*_: bool) -> bytes:
        raise RuntimeError("no recorder")

    monkeypatch.setattr(_distributed_c10d, "_dump_fr_trace_json", refuse)
    assert [entry["name"] for entry in recent_collectives()] == ["nccl:all_gather", "gloo:all_reduce", "nccl:reduce_scatter"]


def test_nccl_and_gloo_are_counted_apart_in_one_group(tmp_path: Path) -> None:
    beats = [replace(own_heartbeat(0, 2, ""), rank=rank) for rank in range(2)]
    (tmp_path / "ranks").mkdir()
    for rank, number in enumerate((8, 9)):
        entry = {"group": "0 default_pg", "sizes": [[1]], "done": True}
        collectives = [entry | {"name": "gloo:all_reduce", "number": 40}, entry | {"name": "nccl:all_gather", "number": number}]
        words_path(tmp_path, rank).write_text(json.dumps({"collectives": collectives}))
    report = compose_report(tmp_path, "no progress", beats, [])
    assert "Group 0 default_pg, collective 9 (nccl:all_gather) was entered by rank 1; rank 0 at 8" in report


def test_stages_of_a_pipeline_are_not_compared_by_micro_batches() -> None:
    first = own_heartbeat(0, 4, "tensor 0, pipeline 0, context 0, data 0")
    beats = [
        replace(first, micro_batch=3),
        replace(first, rank=1, micro_batch=3),
        replace(first, rank=2, coordinates="tensor 0, pipeline 1, context 0, data 0", micro_batch=2),
        replace(first, rank=3, coordinates="tensor 0, pipeline 1, context 0, data 1", micro_batch=1),
    ]
    assert [beat.rank for beat in first_behind(beats)] == [3]
    assert [beat.rank for beat in first_behind(beats[:3])] == [0, 1, 2]
    assert [beat.rank for beat in first_behind(beats, silent=[2])] == [2]


@pytest.mark.parametrize("fault", ["sleeps", "holds the interpreter"])
def test_stacks_show_where_the_culprit_was(endings: dict[str, tuple[Path, list[Outcome]]], fault: str) -> None:
    stacks = (endings[fault][0] / "ranks" / f"rank_{CULPRIT:04d}.stacks.txt").read_text()
    assert re.search(r"test_watchdog\.py.* in meet", stacks), stacks


def test_a_frozen_rank_is_known_by_its_silence(endings: dict[str, tuple[Path, list[Outcome]]]) -> None:
    assert re.search(r"rank 1 was last heard of \d+\.\d s ago", text(endings["frozen"][1]))


def test_a_killed_rank_is_named_at_once(endings: dict[str, tuple[Path, list[Outcome]]]) -> None:
    _, outcomes = endings["killed"]
    assert outcomes[CULPRIT].exit_code == -signal.SIGKILL
    for outcome in outcomes:
        if outcome.rank != CULPRIT:
            assert outcome.exit_code == 3, outcome.output
            said = rf"REPORT rank {outcome.rank} lost contact at step 3 \(update\); last heard of rank 1: step 3 \(rows\), "
            assert re.search(said, outcome.output), outcome.output


def test_a_failure_is_passed_on_to_the_peers(endings: dict[str, tuple[Path, list[Outcome]]]) -> None:
    _, outcomes = endings["raises"]
    own = "failed at step 3 (rows): ValueError: row 7 is longer than 64 tokens"
    assert f"REPORT rank 1 {own}" in outcomes[CULPRIT].output
    for outcome in outcomes:
        if outcome.rank != CULPRIT:
            assert f"REPORT rank {outcome.rank} ended at step 3 (update) because rank 1 {own}" in outcome.output


def test_a_run_without_faults_ends_silently(endings: dict[str, tuple[Path, list[Outcome]]]) -> None:
    folder, outcomes = endings["none"]
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], text(outcomes)
    assert "progress" not in text(outcomes)
    assert not (folder / "ranks" / "hang.txt").exists() and not (folder / "hangs").exists()


def test_a_rank_that_never_started_is_named(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 0, 3, 10.0, sys.stderr)
    Watchdog(tmp_path, 2, 3, 10.0, sys.stderr)
    watchdog.beat(1, "rows")
    assert watchdog._who_is_behind(watchdog.read()) == (
        "rank 2 is at step 0 (start) while the others are at step 1 (rows); rank 1 never started"
    )
