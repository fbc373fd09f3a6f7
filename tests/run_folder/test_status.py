"""What `glmv status` says of runs in every state, from files as runs leave them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_glmv import cli
from megatron_glmv.config.base import InputError
from megatron_glmv.run_folder.events import record_event
from megatron_glmv.run_folder.heartbeat import Heartbeat, describe_end, heartbeat_path, own_heartbeat, read_heartbeats
from megatron_glmv.run_folder.refusal import note_refusal
from megatron_glmv.run_folder.status import describe_state
from tests.stages import REPOSITORY

NOW = 1000.0
HEAVY = ("torch", "megatron.core", "transformers", "nvidia.dali")
ALIVE = Heartbeat(0, 7, "step", 30, NOW - 2, socket.gethostname(), os.getpid())
FAR = replace(ALIVE, rank=1, host="another", process=1)
STATES = {
    "running, 2 ranks, heard of 0:02 ago; at step 7 (step)": [ALIVE, FAR],
    "running at step 7, but silent: rank 1": [ALIVE, replace(FAR, heard=NOW - 300)],
    "broke off 5:00 ago at step 7; first silent: rank 1 at step 6 (data)": [
        replace(ALIVE, host="another", heard=NOW - 300),
        replace(FAR, step=6, phase="data", heard=NOW - 301),
    ],
    "broke off 0:02 ago at step 7; first silent: rank 0 at step 7 (step)": [replace(ALIVE, process=2**22 + 1)],
    "failed 0:09 ago: rank 1 at step 7 (step): OSError: disk": [
        replace(ALIVE, failure="lost contact"),
        replace(FAR, failure="OSError: disk", heard=NOW - 9),
    ],
    "finished 1:00 ago at step 7, 2 ranks": [
        replace(ALIVE, failure="finished", heard=NOW - 60),
        replace(FAR, failure="finished", heard=NOW - 61),
    ],
    "stopped on request 1:00 ago at step 7, 2 ranks": [
        replace(ALIVE, failure="stopped", heard=NOW - 60),
        replace(FAR, failure="stopped", heard=NOW - 61),
    ],
    "never started a rank": [],
}


@pytest.mark.parametrize("state", STATES)
def test_state_is_told_from_what_ranks_last_said(state: str) -> None:
    assert describe_state(STATES[state], NOW) == state


def write_run(folder: Path, config: str, records: list[dict]) -> None:
    (folder / "ranks").mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 9, "lo')
    (folder / "ranks/rank_0000.json").write_bytes(json.dumps(asdict(replace(ALIVE, failure="finished"))).encode().ljust(1024))


def test_a_training_run_is_told_from_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = {
        "step": 8,
        "loss": 1.5,
        "grad_norm": 2.0,
        "step_s": 0.5,
        "tokens_per_s": 4000.0,
        "useful_share": 0.9,
        "skipped_steps": 1,
    }
    planned = {"step": 0, "planned": {"step_s": 0.4, "mfu": 0.5}}
    write_run(tmp_path, "steps: 20", [planned, step, {"step": 8, "eval_loss": 1.25}])
    (tmp_path / "bad_samples_train_0.jsonl").write_text("{}\n{}\n")
    saved = tmp_path / "checkpoints/step_00000006"
    saved.mkdir(parents=True)
    (saved / "meta.json").write_text('{"format": 1, "step": 6}')
    assert cli.main(["status", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    for part in (
        "(glmv train)",
        "step 8 of 20, 40%; 0.50 s a step, 0:06 left",
        "1.5000, gradient norm 2.00",
        "4.00k useful tokens/s, 90% of all",
        "0.40 s a step, MFU 50.0%",
        "1 steps whose gradients were not finite",
        "loss 1.2500 at step 8",
        "step_00000006 of step 6; 1 on disk",
        "2, listed in",
    ):
        assert part in output
    assert len(read_heartbeats(tmp_path)) == 1


def test_a_run_of_reinforcement_learning_is_told_from_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    iteration = {
        "step": 5,
        "expansion": {"useful_share": 0.5},
        "seconds": {"total": 2.0},
        "reward": {"ocr": 0.5, "math": 0.7},
        "accuracy": {"ocr": 0.25, "math": 0.75},
    }
    write_run(tmp_path, "{steps: 10, prompts: {}}", [iteration, {"step": 0, "eval": {"accuracy": {"ocr": 0.2, "math": 0.4}}}])
    assert cli.main(["status", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "step 5 of 10, 50%; 2.00 s a step, 0:10 left" in output
    assert "0.600, accuracy 50.0%, useful groups 50%" in output
    assert "accuracy 30.0% at step 0: math 40.0%, ocr 20.0%" in output
    assert "checkpoint  none" in output


def test_what_befell_a_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = {"rank": 3, "ratio": 1.5, "compute_s": 2.0, "waiting_rank": 1, "wait_s": 0.25}
    save = {"stall_s": 0.5, "seconds": 4.0}
    copy = {"step": 7, "local_copy": {"stall_s": 0.25}}
    write_run(tmp_path, "steps: 20", [copy, {"step": 8, "ranks": ranks}, {"step": 8, "checkpoint": save}])
    record_event(tmp_path, "start", 0, "starting")
    record_event(
        tmp_path, "fault", 7, "the start before this one ended at step 7: rank 1 on n2 was killed", fault="rank 1 on n2"
    )
    record_event(tmp_path, "start", 4, "resuming")
    record_event(tmp_path, "skip", 6, "step 6, batch 5: gradients are not finite")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"kind": "sta')  # a killed rank's
    assert cli.main(["status", str(tmp_path), "--exit-code"]) == 0
    output = capsys.readouterr().out
    for part in (
        "rank 3 computes longest, 1.50 x the mean of its stage; rank 1 waits 0.25 s a step for rows",
        "training stood still for 0.50 s of the 4.00 s",
        "local copy  training stood still for 0.25 s for the last one, of step 7",
        "restarts    1; the last began at step 4, now",
        "faults      1; the last now: the start before this one ended at step 7: rank 1 on n2 was killed",
        "skip        step 6, batch 5: gradients are not finite (now)",
    ):
        assert part in output


@pytest.mark.parametrize(
    ("failures", "earlier", "code"),
    [
        (("finished", "finished"), 0, 0),
        (("stopped", "stopped"), 0, 3),
        (("", ""), 0, 3),
        (("lost contact", ""), 9, 3),
        (("OSError: disk", "lost contact"), 1, 3),
        (("OSError: disk", "lost contact"), 2, 1),
    ],
    ids=["finished", "stopped", "runs", "killed again and again", "failed twice", "failed three times alike"],
)
def test_the_exit_code_says_whether_to_start_again(tmp_path: Path, failures: tuple[str, str], earlier: int, code: int) -> None:
    write_run(tmp_path, "steps: 20", [])
    for rank, failure in enumerate(failures):
        beat = replace(FAR, rank=rank, step=7, failure=failure, heard=NOW - rank)
        heartbeat_path(tmp_path, rank).write_bytes(json.dumps(asdict(beat)).encode())
    for _ in range(earlier):
        record_event(tmp_path, "fault", 7, "before", fault="rank 0 on another at step 7 (step): OSError: disk")
    assert cli.main(["status", str(tmp_path), "--exit-code"]) == code
    assert cli.main(["status", str(tmp_path)]) == 0


def test_what_earlier_launches_have_left_is_not_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run started again with more steps, by a launch that brings no rank to life; then one that is refused."""
    write_run(tmp_path, "steps: 20", [])
    beat = replace(FAR, rank=0, failure="finished", launch="7.0.0")
    heartbeat_path(tmp_path, 0).write_bytes(json.dumps(asdict(beat)).encode())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7.0.0")
    assert own_heartbeat(0, 1, "").launch == "7.0.0"
    assert cli.main(["status", str(tmp_path), "--exit-code", "--launch", "7.0.0"]) == 0
    capsys.readouterr()
    assert cli.main(["status", str(tmp_path), "--exit-code", "--launch", "7.0.1"]) == 3
    assert "never started a rank" in capsys.readouterr().out
    note_refusal(tmp_path, InputError("shard 3 is cut"))
    for launch, code in (("7.0.0", 1), ("7.0.1", 3)):
        assert cli.main(["status", str(tmp_path), "--exit-code", "--launch", launch]) == code
        assert ("shard 3" in capsys.readouterr().out) == (code == 1)
    (tmp_path / "config.yaml").unlink()
    assert cli.main(["status", str(tmp_path), "--exit-code", "--launch", "7.0.1"]) == 3


def test_how_an_earlier_start_ended() -> None:
    assert describe_end([]) is None
    assert describe_end([replace(ALIVE, failure="stopped"), replace(FAR, failure="finished")]) is None
    assert describe_end([replace(ALIVE, failure="lost contact"), replace(FAR, step=8)]) == (
        8,
        "rank 1 on another was killed at step 8 (step)",
    )
    assert describe_end([ALIVE, replace(FAR, heard=NOW - 9)]) == (
        7,
        "rank 1 on another was killed at step 7 (step) (2 of 2 ranks ended without a word)",
    )
    assert describe_end([replace(ALIVE, failure="lost contact"), replace(FAR, failure="OSError: disk")]) == (
        7,
        "rank 1 on another at step 7 (step): OSError: disk",
    )


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([str(tmp_path)], [str(tmp_path / "none"), "--exit-code"]):
        assert cli.main(["status", *words]) == 1
        assert "holds no config.yaml" in capsys.readouterr().err


def test_a_run_that_came_to_no_step_can_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The launcher has made its folder; then ranks were killed before they wrote a configuration; then a fault came to stay."""
    assert cli.main(["status", str(tmp_path), "--exit-code"]) == 3
    assert "never started a rank" in capsys.readouterr().out
    (tmp_path / "ranks").mkdir()
    heartbeat_path(tmp_path, 0).write_bytes(
        json.dumps(asdict(replace(ALIVE, step=0, phase="start", process=2**22 + 1))).encode()
    )
    assert cli.main(["status", str(tmp_path), "--exit-code"]) == 3
    said = capsys.readouterr().out
    assert "(no rank has come to its first step)" in said and "broke off" in said
    assert cli.main(["status", str(tmp_path)]) == 0
    note_refusal(tmp_path, InputError("shard 3 is cut"))
    assert cli.main(["status", str(tmp_path), "--exit-code"]) == 1
    assert "cannot go on: shard 3 is cut" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["status", "{run}"], ["status", "{run}", "--exit-code"], ["stop", "{run}"]])
def test_a_run_is_looked_at_without_torch(tmp_path: Path, words: list[str]) -> None:
    write_run(tmp_path, "steps: 20", [])
    words = [word.format(run=tmp_path) for word in words]
    look = f"import sys; from megatron_glmv import cli; cli.main({words!r}); print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout
