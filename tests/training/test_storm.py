"""Kills at random moments, saves included, over one run that starts again by itself: as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.stages import start_stage
from tests.training.storm import RANKS, figures, rage, run_file


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_storm_of_kills_changes_nothing(tmp_path: Path, kills: int) -> None:
    calm = start_stage("train", run_file(tmp_path, "calm", kills), RANKS)
    output, _ = calm.communicate(timeout=1200)
    assert calm.returncode == 0, output
    storm = rage(run_file(tmp_path, "storm", kills), tmp_path / "storm", kills, seed=kills)
    assert storm.exit_code == 0, storm.output[-4000:]
    found = figures(tmp_path, storm)
    print(json.dumps(found, indent=1))
    assert sum(storm.kills.values()) == kills and storm.kills["in a save"] >= kills // 6, found
    assert found["equal to the undisturbed run, bit for bit"], found
    assert found["of these loaded"] == found["complete checkpoints"], found
    assert (found["damaged"], found["left half-written"]) == (0, 0), found
