"""Composed pictures: answers follow from what is drawn, no held-out scan in training, the same bytes after interruptions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import cli, digits

PLAN = digits.Plan(seed=3, train=160, eval=60, mixture=digits.DEFAULT_MIXTURE, max_digits=8)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
        drawn, answer = sample["digits"], sample["answer"]
        question = sample["messages"][0]["content"][1]["text"]
        assert sample["messages"][1]["content"] == [{"type": "text", "text": answer}]
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
        else:
            assert drawn.count(sample["digit"]) == 1
    assert tasks == {"read", "count", "add", "point"}


def test_a_box_holds_the_ink_of_its_digit(folder: Path, samples: list[dict]) -> None:
    pointed = [sample for sample in samples if sample["task"] == "point"]
    for sample in pointed:
        numbers = re.fullmatch(r"<\|begin_of_box\|>\[\[(\d+),(\d+),(\d+),(\d+)\]\]<\|end_of_box\|>", sample["answer"])
        assert numbers is not None
        per_mille = [int(number) for number in numbers.groups()]
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


def test_held_out_scans_stay_out_of_training_whatever_the_seed(folder: Path, samples: list[dict]) -> None:
    held_out = set(digits.load_scans()["eval"].numbers.tolist())
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
        (tmp_path / f"images/train/{number:06d}.png").unlink()
    digits.write_digits(tmp_path, PLAN)
    assert final.read_bytes() == whole == (folder / "train.jsonl").read_bytes()
    for name in ("images/train/000069.png", "images/train/000159.png", "images/eval/000059.png"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_another_seed_gives_other_pictures(folder: Path) -> None:
    scans = digits.load_scans()["train"]
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
