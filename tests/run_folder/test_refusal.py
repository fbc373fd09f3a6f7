"""A second launch in the run folder of one that lives is refused; the dead are waited for no longer than needed."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_glmv import cli
from megatron_glmv.run_folder import refusal
from megatron_glmv.run_folder.heartbeat import Heartbeat, heartbeat_path
from megatron_glmv.run_folder.refusal import OccupiedError, note_refusal, refuse_second_launch

QUIET_S = 2.0
FAR = Heartbeat(0, 7, "step", 30, 0.0, "another", 1, launch="first", began=1000.0)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal, "QUIET_S", QUIET_S)
    monkeypatch.setattr(refusal, "_LOOK_EVERY_S", 0.02)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")


def leave(folder: Path, beat: Heartbeat) -> None:
    (folder / "ranks").mkdir(exist_ok=True)
    path = heartbeat_path(folder, beat.rank)
    path.with_suffix(".tmp").write_bytes(json.dumps(asdict(beat)).encode())
    path.with_suffix(".tmp").replace(path)


def waited_s(folder: Path) -> float:
    began = time.monotonic()
    refuse_second_launch(folder)
    return time.monotonic() - began


OF_THE_DEAD = {
    "never": None,
    "long ago": replace(FAR, heard=-QUIET_S - 1),
    "ended": replace(FAR, failure="finished"),
    "killed on this host": replace(FAR, host=socket.gethostname(), process=2**22 + 1),
    "an earlier start of this launch": replace(FAR, launch="second"),
}
"""What rank 0 last said, so many seconds from now."""


@pytest.mark.parametrize("case", OF_THE_DEAD)
def test_what_is_known_to_be_dead_is_not_waited_for(tmp_path: Path, case: str) -> None:
    beat = OF_THE_DEAD[case]
    if beat is not None:
        leave(tmp_path, replace(beat, heard=time.time() + beat.heard))
    assert waited_s(tmp_path) < 0.5


@pytest.mark.parametrize("ahead_s", [0.0, 1000.0], ids=["same clock", "clock ahead"])
def test_a_silent_host_is_waited_for_and_given_up(tmp_path: Path, ahead_s: float) -> None:
    leave(tmp_path, replace(FAR, heard=time.time() + ahead_s))
    assert QUIET_S - 0.1 < waited_s(tmp_path) < QUIET_S + 2


@pytest.mark.parametrize("given", ["second", "none", None], ids=["with an id", "torchrun's default", "without"])
def test_a_living_launch_is_named(tmp_path: Path, given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if given is None:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    else:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", given)
    # This process's parent stands for a rank of this host that lives.
    beat = replace(FAR, host=socket.gethostname(), process=os.getppid(), heard=time.time())
    leave(tmp_path, beat)
    renewal = threading.Timer(0.3, leave, [tmp_path, replace(beat, heard=beat.heard + 0.3)])
    renewal.start()
    expected = (
        rf"another launch runs there since 19\d\d-.*: rank 0 on {socket.gethostname()}, process {os.getppid()}, is at step 7"
    )
    with pytest.raises(OccupiedError, match=expected):
        refuse_second_launch(tmp_path)
    renewal.join()


def test_a_restart_of_a_launch_without_an_id_knows_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    leave(tmp_path, replace(FAR, launch="", heard=time.time()))
    assert waited_s(tmp_path) < 0.5


def test_the_refusal_of_a_second_launch_is_no_word_about_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path, replace(FAR, heard=time.time()))
    (tmp_path / "config.yaml").write_text("steps: 20")
    note_refusal(tmp_path, OccupiedError("another launch runs there"))
    assert cli.main(["status", str(tmp_path), "--exit-code"]) == 3
    assert "running, 1 ranks" in capsys.readouterr().out
    for launch, code in (("first", 3), ("second", 1)):
        assert cli.main(["status", str(tmp_path), "--exit-code", "--launch", launch]) == code
        assert ("another launch runs there" in capsys.readouterr().out) == (code == 1)
