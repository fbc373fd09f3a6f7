"""``glmv reward``: the table, bad lines, going on where it stopped, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_glmv import cli
from megatron_glmv.config.base import load
from megatron_glmv.config.rewards import RewardsConfig
from megatron_glmv.rl.rewards import command
from tests.rl.rewards.conftest import JudgeServer


def line(domain: str, answer: Any, given: object, **others: Any) -> str:
    response = f"<think>hm</think><answer><|begin_of_box|>{given}<|end_of_box|></answer>"
    return json.dumps({"domain": domain, "question": "?", "answer": answer, "response": response, **others})


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    lines = [
        line("math", "42", "42.0", note="kept"),
        line("math", "7", "3 or 7"),
        line("ocr", "hello", "hallo", options={"correct_from": 0.5}, media=["a.png"]),
        line("grounding", [[0, 0, 10, 10]], "[[0,0,10,10]]", key="g1", subcategory="ui"),
        line("counting", 3, "three", note="\ud800"),
    ]
    return write(tmp_path / "answers.jsonl", lines)


def test_it_scores_a_file_and_prints_the_table(answers: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["reward", str(answers)]) == 0
    shown = capsys.readouterr().out
    rows = [row.split() for row in shown.splitlines()]
    assert ["math", "2", "0.500", "50.0%", "-", "several", "1", "-"] in rows
    assert ["ocr", "1", "0.800", "100.0%", "-", "-", "-"] in rows
    scored = [json.loads(text) for text in (answers.parent / "answers.scored.jsonl").read_text().splitlines()]
    assert [tree["reward"]["value"] for tree in scored] == [1.0, 0.0, 0.8, 1.0, 1.0]
    assert scored[0]["note"] == "kept"
    assert scored[1]["reward"]["reason"] == "hack: several"
    assert [tree["reward"]["line"] for tree in scored] == [1, 2, 3, 4, 5]
    assert {path.name for path in answers.parent.iterdir()} == {"answers.jsonl", "answers.scored.jsonl"}


BAD = [
    ("{torn", "not JSON"),
    ("[1]", "not a JSON object"),
    ('{"answer": "1", "response": "x"}', "no key domain"),
    ('{"domain": "math", "answer": "1"}', "no key response"),
    ('{"domain": "math", "answer": "1", "response": 3}', "no text under the key response"),
    ('{"domain": "math", "response": "x"}', "no key answer"),
    ('{"domain": "alchemy", "answer": "1", "response": "x"}', "no domain 'alchemy'; rewards.domains has math, "),
    ('{"domain": "math", "answer": "1", "response": "x", "options": {"tol": 1}}', "options: tol: unknown key"),
    ('{"domain": "math", "answer": "1", "response": "x", "options": [1]}', "the key options holds no dict"),
    ('{"domain": "math", "answer": "1", "response": "x", "media": "a.png"}', "the key media holds no list"),
    ('{"domain": "math", "answer": "1", "response": "x", "question": 3}', "the key question holds no text"),
    ("[" * 100_000, "not JSON"),
]


def test_bad_lines_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write(tmp_path / "a.jsonl", [*(text for text, _ in BAD), "", line("math", "1", "1")])
    assert cli.main(["reward", str(file)]) == 0
    shown = capsys.readouterr()
    for number, (_, fault) in enumerate(BAD, 1):
        assert f"{file}:{number}: {fault}" in shown.err
    assert f"{len(BAD)} bad lines left out" in shown.out
    file = write(tmp_path / "b.jsonl", ["{torn"])
    assert cli.main(["reward", str(file)]) == 1
    assert "no line can be scored" in capsys.readouterr().err


def test_open_answers_need_no_reference(tmp_path: Path, judge_server: JudgeServer):
    judge_server.reply = lambda body, number: "SCORE: 0.7"
    text = json.dumps({"domain": "general", "question": "A poem!", "response": "<think>a</think><answer>Roses.</answer>"})
    file = write(tmp_path / "a.jsonl", [text])
    config = write(tmp_path / "c.yaml", [f"judge: {{endpoints: [{{url: '{judge_server.url}'}}]}}"])
    assert cli.main(["reward", str(file), "--config", str(config), "workers=1"]) == 0
    assert json.loads((tmp_path / "a.scored.jsonl").read_text())["reward"]["value"] == 0.7


def test_it_goes_on_where_it_stopped(tmp_path: Path, judge_server: JudgeServer, capsys: pytest.CaptureFixture[str]):
    """The judge fails for some: those are asked again, the others are not; other settings score everything anew."""
    file = write(tmp_path / "a.jsonl", [line("vqa", f"cat {n}", "dog") for n in range(10)])
    judge_server.reply = lambda body, number: 401 if "cat 3" in body["messages"][0]["content"] else "VERDICT: CORRECT"
    settings = ["workers=1", f"judge.endpoints=[{{url: '{judge_server.url}'}}]"]
    out = tmp_path / "out.jsonl"
    assert cli.main(["reward", str(file), "--out", str(out), "--config", *settings]) == 0
    assert "judge_down 1" in capsys.readouterr().out
    asked = len(judge_server.bodies)
    judge_server.reply = lambda body, number: "VERDICT: INCORRECT"
    assert cli.main(["reward", str(file), "--out", str(out), "--config", *settings]) == 0
    shown = capsys.readouterr()
    assert "9 of 10 answers are scored already" in shown.err
    assert len(judge_server.bodies) == asked + 1
    assert [json.loads(text)["reward"]["value"] for text in out.read_text().splitlines()] == [1, 1, 1, 0, 1, 1, 1, 1, 1, 1]
    assert cli.main(["reward", str(file), "--out", str(out), "--config", *settings, "domains.vqa.tolerance=0.1"]) == 0
    assert len(judge_server.bodies) == asked + 11


def test_a_killed_run_keeps_what_was_scored(tmp_path: Path, judge_server: JudgeServer):
    judge_server.delay_s = 0.1
    file = write(tmp_path / "a.jsonl", [line("vqa", f"cat {n}", "dog") for n in range(30)])
    settings = ["workers=1", "judge.concurrency=1", f"judge.endpoints=[{{url: '{judge_server.url}'}}]"]
    arguments = [sys.executable, "-m", "megatron_glmv", "reward", str(file), "--config", *settings]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = tmp_path / "a.scored.jsonl.part"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not partial.exists() or partial.read_text().count("\n") < 3):
        time.sleep(0.05)
    process.kill()
    process.wait()
    with partial.open("a") as torn:
        torn.write('{"reward": {"val')
    judge_server.delay_s = 0.0
    kept = partial.read_text().count("\n")
    assert 3 <= kept < 30
    time.sleep(0.3)  # the request that was under way
    asked = len(judge_server.bodies)
    assert cli.main(["reward", str(file), "--config", *settings]) == 0
    assert len(judge_server.bodies) - asked == 30 - kept
    assert len((tmp_path / "a.scored.jsonl").read_text().splitlines()) == 30
    assert not partial.exists()


def test_too_many_masked_stop_early_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write(tmp_path / "a.jsonl", [line("geo", f"Paris {n}", "Lyon") for n in range(200)])
    assert cli.main(["reward", str(file), "--config", "workers=1"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "50 of 50 answers could not be judged, more than max_masked_share 0.25: no_judge 50" in error


@pytest.mark.parametrize(
    ("arguments", "code", "fault"),
    [
        (["none.jsonl"], 1, "none.jsonl: cannot be read (No such file or directory)"),
        ([], 2, "no file of answers given"),
        (["answers.jsonl", "--out", "answers.jsonl"], 1, "the scores would overwrite the answers"),
        (["answers.jsonl", "--out", "other.jsonl"], 1, "other.jsonl:1: not a file of scores; give another --out"),
        (["answers.jsonl", "--config", "domains.math.tol=1"], 2, "tol: unknown key; `glmv reward --schema` lists"),
        (["answers.jsonl", "--config", "none.yaml"], 2, "none.yaml: no such configuration file"),
        (["answers.jsonl", "--out", "no/folder/x.jsonl"], 1, "x.jsonl.part: cannot be written"),
        (["answers.jsonl", "--config", "domains.math.prompt=none.txt"], 2, "none.txt: the judge's prompt cannot be read"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    answers: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    fault: str,
):
    monkeypatch.chdir(answers.parent)
    write(answers.parent / "other.jsonl", ["my notes"])
    assert cli.main(["reward", *arguments]) == code
    error = capsys.readouterr().err
    assert fault in error
    assert error.count("\n") == 1


def test_the_schema_says_what_every_setting_means(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["reward", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "max_masked_share" in schema["properties"]
    assert "0.5" not in schema["$defs"]["GroundingConfig"]["properties"]["iou"]["description"]


def test_the_digest_changes_with_what_changes_a_reward_only(answers: Path):
    def digests(*overrides: str) -> list[str]:
        return [scored.digest for scored in command.read_lines(answers, load(RewardsConfig, [], overrides))[0]]

    assert digests("workers=7", "timeout_s=1", "max_masked_share=1") == digests()
    assert digests("gates.format.think=optional") != digests()
