"""`glmv rl` as a user runs it: engine and trainer agree after every update, a killed run continues exactly, faults are counted.

Real ranks over gloo, real pictures and videos, the real command line. The model is random and the reward is likeness to a text,
so that every group has a gradient.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_glmv.run_folder.checkpoint_folder import latest
from tests.data.processor import write_processor
from tests.rl.prompt_files import write_prompts
from tests.stages import start_stage
from tests.training.runs import heartbeat_of

STEPS, EVERY = 5, 2
GAP = 1e-3
"""Nats of any token, in float32; measured 3e-5."""
TIMED = ("seconds", "share", "rollout_idle_share")
"""What differs between two runs that do the same."""


def config_file(folder: Path, name: str, **changes: Any) -> Path:
    """A small run with a folder and a file of this name."""
    if not (folder / "processor").is_dir():
        write_processor(folder / "processor", min_pixels=1568)
        write_prompts(folder / "prompts")
    tree: dict[str, Any] = {
        "run_folder": str(folder / name),
        "steps": STEPS,
        "model": {"preset": "digits", "init_std": 0.08},
        "parallel": {"tensor": 2, "timeout_s": 60},
        "precision": {"dtype": "fp32", "layers": "torch"},
        "prompts": {
            "processor": str(folder / "processor"),
            "sources": [{"path": str(folder / "prompts/prompts.jsonl")}],
            "eval_sources": [{"path": str(folder / "prompts/prompts.jsonl")}],
            "decode_threads": 1,
        },
        "sampling": {"prompts_per_step": 6, "group_size": 4},
        "force_answer": {"thinking_tokens": 8, "answer_tokens": 4, "answer_open": ""},
        "rewards": {
            "workers": 1,
            "gates": {"format": {"think": "optional", "answer": "optional"}},
            "domains": {"ocr": {"box": "none", "correct_from": 0.2}},
        },
        "repack": {"row_length": 512},
        "optimizer": {"lr": 0.001, "schedule": "constant"},
        "checkpoint": {"every_steps": EVERY, "keep": 10},
        "metrics": {"ranks_every_steps": 2},
        "evaluation": {"prompts": 6, "answers": 2},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree | changes), encoding="utf-8")
    return path


def finish(file: Path, ranks: int, *overrides: str) -> str:
    """Run `glmv rl` to its end; returns its output."""
    process = start_stage("rl", file, ranks, *overrides)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def records_of(run: Path) -> dict[int, dict[str, Any]]:
    """The record of every iteration, without times."""
    if not (run / "metrics.jsonl").is_file():
        return {}
    listed = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {r["step"]: {k: v for k, v in r.items() if k not in TIMED} for r in listed if "expansion" in r}


def evaluations_of(run: Path) -> list[dict[str, Any]]:
    """The held-out records, in order."""
    listed = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record["eval"] for record in listed if "eval" in record]


def rollouts_of(run: Path) -> dict[int, list[dict[str, Any]]]:
    """The groups of every iteration."""
    files = sorted((run / "rollouts").glob("step_*.jsonl"))
    return {int(file.stem[5:]): [json.loads(line) for line in file.read_text().splitlines()] for file in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rl")


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[Path, str]:
    """A run that nothing disturbs, tensor 2, and its output."""
    output = finish(config_file(folder, "whole"), 2)
    return folder / "whole", output


@pytest.fixture(scope="module")
def replicas(folder: Path) -> Path:
    """Two replicas, two updates an iteration, a KL and an entropy term, overlapped gathering, a local copy."""
    changes = {
        "parallel": {"timeout_s": 60},
        "steps": 3,
        "optimizer": {"lr": 0.0001, "schedule": "constant"},
        "algorithm": {"updates_per_rollout": 2, "kl_coefficient": 0.1, "entropy_coefficient": 0.001},
        "checkpoint": {"every_steps": EVERY, "local_folder": str(folder / "copies"), "local_every_steps": 1},
    }
    finish(config_file(folder, "replicas", **changes), 2)
    return folder / "replicas"


def test_engine_and_trainer_agree_after_every_update(whole, replicas: Path) -> None:
    for run, steps in ((whole[0], STEPS), (replicas, 3)):
        records = records_of(run)
        assert sorted(records) == list(range(1, steps + 1))
        for record in records.values():
            assert record["policy"]["tokens"] > 50
            assert record["policy"]["gap_max"] < GAP
            assert record["response"]["forced_share"] > 0
            assert record["grad_norm"] > 0


def test_answers_are_sampled_from_the_newest_weights(whole) -> None:
    for step, groups in rollouts_of(whole[0]).items():
        assert {answer["weights_version"] for group in groups for answer in group["answers"]} == {step - 1}


def test_prompts_of_every_kind_are_rolled_out(whole) -> None:
    media = {
        tuple(Path(name).suffix for name in group["media"]) for groups in rollouts_of(whole[0]).values() for group in groups
    }
    assert {(), (".png",), (".png", ".png"), (".mp4",)} <= media


def test_advantages_are_those_of_the_rewards(whole) -> None:
    group = rollouts_of(whole[0])[1][0]
    rewards = [answer["reward"] for answer in group["answers"]]
    mean = sum(rewards) / len(rewards)
    spread = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
    expected = [(reward - mean) / spread if spread else 0.0 for reward in rewards]
    assert [answer["advantage"] for answer in group["answers"]] == pytest.approx(expected)


def test_what_cannot_be_used_is_counted(whole) -> None:
    run, output = whole
    assert "12 prompts" not in output and "13 prompts: ocr 13; skipped: no answer 1" in output
    lost = sum(record["lost"]["bad_prompts"] for record in records_of(run).values())
    drawn_missing = output.count("nowhere.png")
    assert lost == drawn_missing


def test_held_out_prompts_are_answered_before_and_after(whole) -> None:
    before, after = evaluations_of(whole[0])
    assert set(before["pass@1"]) == set(after["pass@2"]) == {"ocr"}
    assert before["reward"] != after["reward"]


def test_a_reference_holds_the_start_and_moves_away(replicas: Path) -> None:
    records = records_of(replicas)
    # The first of two updates is at the reference, the last of six is five updates away from it.
    assert 0 < 3 * records[1]["policy"]["kl_reference"] < records[3]["policy"]["kl_reference"]
    assert records[1]["updates"] == 2
    assert records[1]["policy"]["ratio_max"] > 1.0


def test_what_saves_cost_is_recorded(replicas: Path) -> None:
    listed = [json.loads(line) for line in (replicas / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for kind, steps in (("local_copy", [1]), ("checkpoint", [EVERY, 3])):
        stalls = {record["step"]: record[kind]["stall_s"] for record in listed if kind in record}
        assert list(stalls) == steps and all(stall > 0 for stall in stalls.values())


def test_ranks_are_compared_in_some_updates(whole, replicas: Path) -> None:
    for run, steps in ((whole[0], (2, 4)), (replicas, (2,))):
        listed = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        found = {record["step"]: record["ranks"] for record in listed if "ranks" in record}
        assert tuple(found) == steps
        for ranks in found.values():
            assert ranks["rank"] in (0, 1) and 1 <= ranks["ratio"] < 2
            assert ranks["compute_s"] > 0 and ranks["wait_s"] > 0, "one rank or both decode the pictures again"


def wait_for_iteration(run: Path, iteration: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while max(records_of(run), default=0) < iteration and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def wait_for_copies(disk: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until both ranks have their local copies of a step."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if len(list(disk.glob(f"*/step_{step:08d}/rank_????/meta.json"))) == 2:
            return
        time.sleep(0.02)
    raise AssertionError(f"local copies of step {step} were never complete: {process.communicate()[0]}")


def kill(launcher: subprocess.Popen[str]) -> str:
    """Kill the launcher, whose ranks end with it; returns the output."""
    os.kill(launcher.pid, signal.SIGKILL)
    return launcher.communicate()[0]


def test_a_stopped_and_a_killed_run_continue_exactly(whole, folder: Path) -> None:
    """Stopped, and killed twice: one start goes on from the shared checkpoint for want of a local copy, one from the copies."""
    run, disk = folder / "killed", folder / "disk"
    keys = {"every_steps": EVERY, "keep": 10, "local_folder": str(disk), "local_every_steps": 1}
    file = config_file(folder, "killed", checkpoint=keys)
    process = start_stage("rl", file, 2)
    wait_for_iteration(run, 1, process)
    os.kill(heartbeat_of(run, 1).process, signal.SIGUSR1)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "stopped on request at step" in output
    assert heartbeat_of(run, 0).failure == "stopped"
    assert latest(run) is not None

    process = start_stage("rl", file, 2)
    wait_for_copies(disk, EVERY + 1, process)
    kill(process)
    assert EVERY < max(records_of(run)) < STEPS
    [copy] = disk.glob(f"*/step_{EVERY + 1:08d}/rank_0001")
    shutil.rmtree(copy)

    process = start_stage("rl", file, 2)
    wait_for_copies(disk, EVERY + 1, process)
    why = f"(not from the local copies: rank 1's of step {EVERY + 1} is not on its node) at step {EVERY}: "
    assert f"resuming {run}/checkpoints/step_{EVERY:08d} {why}" in kill(process)

    assert f"resuming {copy.with_name('rank_0000')} at step {EVERY + 1}: " in finish(file, 2)
    assert records_of(run) == records_of(whole[0])
    assert rollouts_of(run) == rollouts_of(whole[0])
    assert evaluations_of(run) == evaluations_of(whole[0])
    assert list(disk.iterdir()) == []
