"""Composed pictures and clips: answers follow from what is drawn, no held-out scan in training, the same bytes again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_tools import cli, digits, handwriting
from megatron_glmv.config.rewards import RewardsConfig
from megatron_glmv.data.videos import VideoSettings, plan_video, read_video_header
from megatron_glmv.rl.rewards.rewarder import Rewarder
from megatron_glmv.rl.types import Task
from megatron_glmv.sequence.grid import PixelLimits

DOMAINS = {"ocr", "counting", "grounding", "video"}
PLAN = digits.Plan(seed=3, train=160, eval=100, mixture=digits.DEFAULT_MIXTURE, max_digits=8)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _written(sample: dict) -> str:
    return sample["messages"][1]["content"][0]["text"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    digits.write_digits(out, PLAN)
    return out


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[dict]:
    return read_lines(folder / "train.jsonl") + read_lines(folder / "eval.jsonl")


def test_answers_follow_from_the_picture(samples: list[dict]) -> None:
    tasks = set()
    for sample in samples:
        drawn, answer = sample["digits"], sample["messages"][1]["content"][0]["text"]
        question = sample["messages"][0]["content"][1]["text"]
        assert [item["type"] for message in sample["messages"] for item in message["content"]][1:] == ["text", "text"]
        assert sample["task"] == "point" or answer == sample["answer"]
        tasks.add(sample["task"])
        if sample["task"] == "read":
            assert answer == "".join(map(str, drawn))
            assert 1 <= len(drawn) <= 8
        elif sample["task"] == "add":
            assert int(answer) == sum(drawn)
            assert len(drawn) in (2, 3)
        elif "digit" in sample and sample["task"] == "count":
            assert int(answer) == drawn.count(sample["digit"])
            assert str(sample["digit"]) in question
        elif sample["task"] == "count":
            assert int(answer) == len(drawn)
        elif sample["task"] == "watch":
            assert answer == "".join(map(str, drawn))
            assert 1 <= len(drawn) <= 5
            assert len(drawn) == 1 or drawn[0]
        else:
            assert drawn.count(sample["digit"]) == 1
    assert tasks == set(digits.TASKS)


def test_a_box_holds_the_ink_of_its_digit(folder: Path, samples: list[dict]) -> None:
    pointed = [sample for sample in samples if sample["task"] == "point"]
    for sample in pointed:
        numbers = re.fullmatch(r"<\|begin_of_box\|>\[\[(\d+),(\d+),(\d+),(\d+)\]\]<\|end_of_box\|>", _written(sample))
        assert numbers is not None
        per_mille = [int(number) for number in numbers.groups()]
        assert sample["answer"] == [per_mille]
        assert max(per_mille) <= 999
        x1, y1, x2, y2 = sample["box"]
        width, height = sample["width"], sample["height"]
        assert np.abs(np.array(per_mille) / 1000 * [width, height, width, height] - sample["box"]).max() <= 0.2
        pixels = np.asarray(Image.open(folder / sample["messages"][0]["content"][0]["image"])).astype(int)
        assert pixels.shape == (height, width, 3)
        dark = pixels.mean(axis=2) < (pixels.max() + pixels.min()) / 2
        assert dark[y1:y2, x1:x2].any()
        cell = dark[y1 // 28 * 28 : y1 // 28 * 28 + 28, x1 // 28 * 28 : x1 // 28 * 28 + 28]
        assert dark[y1:y2, x1:x2].sum() == cell.sum()
    assert len(pointed) > 10


def test_a_clip_shows_each_digit_for_one_temporal_patch(folder: Path, samples: list[dict]) -> None:
    """As the quickstart's processor samples it. The colours' conversion moves a value by 14 at most, by 2 on average."""
    scans = handwriting.load_scans()
    watched = [sample for sample in samples if sample["task"] == "watch"]
    lengths = set()
    for sample in watched:
        _, split, name = sample["messages"][0]["content"][0]["video"].split("/")
        path = folder / "videos" / split / name
        plan = plan_video(read_video_header(path), VideoSettings(PixelLimits(1568, 47_040_000)))
        number = len(sample["digits"])
        assert (plan.grid.frames, plan.height, plan.width) == (number, 28, 28)
        assert plan.frame_indices == tuple(range(2 * number))
        assert plan.seconds == tuple(range(number))
        with av.open(str(path)) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)
        drawing = digits.make_sample(scans[split], PLAN, split, int(Path(name).stem))[1]
        assert np.abs(frames - drawing.frames).max() <= 16
        assert np.abs(frames - drawing.frames).mean() < 2.2
        for pixels, (x1, y1, x2, y2) in zip(frames[::2], drawing.boxes, strict=True):
            dark = pixels.mean(axis=2) < (frames.max() + frames.min()) / 2
            assert dark.sum() == dark[y1:y2, x1:x2].sum() > 20
        lengths.add(number)
    assert lengths >= {1, 2, 3, 4}


def test_the_verifier_of_its_domain_calls_the_written_answer_right_and_another_wrong(samples: list[dict]) -> None:
    """So a record is a prompt of reinforcement learning as it stands; its answers hold no tags, as trained."""
    config = RewardsConfig.model_validate(
        {"gates": {"format": {"think": "optional", "answer": "optional"}}, "domains": {d: {"box": "optional"} for d in DOMAINS}}
    )
    some = [sample for task in digits.TASKS for sample in [s for s in samples if s["task"] == task][:8]]
    tasks = [Task(s["id"], s["domain"], s["messages"][0]["content"][1]["text"], s["answer"], s["subcategory"]) for s in some]
    assert {task.domain for task in tasks} == DOMAINS
    assert [task.subcategory for task in tasks] == [sample["task"] for sample in some]
    others = [next(_written(t) for t in some if t["task"] == s["task"] and t["answer"] != s["answer"]) for s in some]
    with Rewarder(config) as rewarder:
        right = rewarder.score([(task, _written(sample)) for task, sample in zip(tasks, some, strict=True)])
        wrong = rewarder.score([(task, other) for task, other in zip(tasks, others, strict=True)])
    assert all(reward.correct and reward.value == 1.0 for reward in right)
    assert not any(reward.correct for task, reward in zip(tasks, wrong, strict=True) if task.domain != "grounding")


def test_eval_asks_every_task_of_the_mixture_alike() -> None:
    scans = handwriting.load_scans()["eval"]
    plan = digits.Plan(seed=0, train=1, eval=300, mixture=digits.DEFAULT_MIXTURE | {"count": 0.0}, max_digits=8)
    tasks = [digits.make_sample(scans, plan, "eval", number)[0]["task"] for number in range(plan.eval)]
    assert "count" not in tasks
    assert all(50 <= tasks.count(task) <= 100 for task in set(digits.TASKS) - {"count"})


def test_held_out_scans_stay_out_of_training_whatever_the_seed(folder: Path, samples: list[dict]) -> None:
    held_out = set(handwriting.load_scans()["eval"].numbers.tolist())
    assert len(held_out) == 360
    for split in ("train", "eval"):
        shown = {scan for sample in read_lines(folder / f"{split}.jsonl") for scan in sample["scans"]}
        assert (shown <= held_out) if split == "eval" else not (shown & held_out)


def test_an_interrupted_run_continues_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    digits.write_digits(tmp_path, PLAN)
    final = tmp_path / "train.jsonl"
    whole = final.read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "train.jsonl.partial").write_bytes(b"".join(lines[:70]) + lines[70][:25])
    final.unlink()
    for number in range(70, PLAN.train):
        for kept in ("images/train/{}.png", "videos/train/{}.mp4"):
            (tmp_path / kept.format(f"{number:06d}")).unlink(missing_ok=True)
    digits.write_digits(tmp_path, PLAN)
    assert final.read_bytes() == whole == (folder / "train.jsonl").read_bytes()
    media = [path.relative_to(folder) for suffix in ("png", "mp4") for path in folder.rglob(f"*.{suffix}")]
    assert len(media) == PLAN.train + PLAN.eval
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in media)


def test_another_seed_gives_other_pictures(folder: Path) -> None:
    scans = handwriting.load_scans()["train"]
    other = digits.Plan(seed=4, train=1, eval=1, mixture=digits.DEFAULT_MIXTURE, max_digits=8)
    records = [digits.make_sample(scans, plan, "train", 5)[0]["scans"] for plan in (PLAN, PLAN, other)]
    assert records[0] == records[1] != records[2]


def test_a_folder_made_with_other_arguments_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["digits", str(folder), "--train", "5", "--eval", "5"]) == 1
    assert "made with other arguments" in capsys.readouterr().err
    assert len(read_lines(folder / "train.jsonl")) == PLAN.train


@pytest.mark.parametrize("mixture", ["reed=1", "read=x", "read=-1,add=2", "read=0"])
def test_a_wrong_mixture_is_a_usage_error(mixture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["digits", str(tmp_path / "out"), "--mixture", mixture])
    assert stopped.value.code == 2
    assert "TASK=SHARE" in capsys.readouterr().err


def test_help_names_the_tools_and_explains_each(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in (([], "train-tokenizer"), (["digits"], "per mille"), (["pack"], "dropped.jsonl")):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*arguments, "--help"])
        assert stopped.value.code == 0
        assert text in capsys.readouterr().out
