"""`glmv-data grade` on a small real model: pass rates are those of its answers, whether it was stopped, divided or not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from data_tools import cli
from megatron_glmv.config.grade import load_grade
from megatron_glmv.config.prompts import PromptSourceConfig
from megatron_glmv.config.rl import AlgorithmConfig
from megatron_glmv.data.chat import Chat
from megatron_glmv.rl.advantage import group_advantages
from megatron_glmv.rl.engines.embedded import EmbeddedEngine
from megatron_glmv.rl.engines.engine import Request
from megatron_glmv.rl.grade_models import Model, open_engine
from megatron_glmv.rl.grading import TIERS, pass_at_k, tier_of
from megatron_glmv.rl.prompt_reader import PromptReader
from megatron_glmv.rl.prompts import PromptFiles
from megatron_glmv.rl.rewards.rewarder import Rewarder
from megatron_glmv.rl.rollout_files import rollout_file, write_rollouts
from megatron_glmv.rl.sampling import sampling_in_ids
from megatron_glmv.rl.types import Answer, Group, Prompt, Reward, Rollout, Task
from tests.data.processor import write_processor
from tests.model import oracle
from tests.rl.fake_vllm import FakeVllm
from tests.rl.prompt_files import write_prompts

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_ANSWERS = 8
SHAPE = oracle.model_shape("digits")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, prompts of every kind and fate, and a configuration; `known` is graded in one go."""
    folder = tmp_path_factory.mktemp("grade")
    for seed, name in enumerate(("small", "other")):
        oracle.random_model("digits", seed).save_pretrained(folder / name, max_shard_size="1MB")
        write_processor(folder / name, min_pixels=1568)
    path = write_prompts(folder / "prompts", 16)
    more = [{"domain": "reading", "id": "text"}, {"domain": "math", "id": "unsolvable", "answer": "41"},
            {"domain": "general", "id": "no judge"}]  # fmt: skip
    asked = {
        "messages": [{"role": "user", "content": "Read it."}],
        "answer": "e a o i t n r s l d",
        "note": "kept \ud83d\ude00",
    }
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asked | line) + "\n" for line in more)
    config = {
        "sampling": {"group_size": NUM_ANSWERS, "prompts_per_step": 6, "max_tokens": 12},
        "force_answer": {"enabled": False},
        "rewards": {
            "workers": 1,
            "gates": {"format": {"think": "optional", "answer": "optional"}},
            "domains": {
                "ocr": {"box": "none", "correct_from": 0.05},
                "reading": {"verifier": "ocr", "box": "none", "correct_from": 0.05},
            },
        },
        "prompts": {"sources": []},
        "steps": 3,
    }
    (folder / "rl.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert cli.main(command(folder, "known")) == 0
    return folder


def test_a_server_answers_with_the_weights_of_the_folder(base: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    asked = {"messages": [{"role": "user", "content": "Read it."}], "domain": "reading", "answer": "e a o i t n r s l d"}
    prompts.write_text("".join(json.dumps(asked | {"id": str(place)}) + "\n" for place in range(3)), encoding="utf-8")
    fake = FakeVllm()
    try:
        arguments = ["grade", str(prompts), "--out", str(tmp_path / "graded.jsonl"), "--config", str(base / "rl.yaml")]
        more = ["grading.drop_unsolvable=false", "grading.drop_trivial=false"]
        assert cli.main([*arguments, *more, "--model", str(base / "small"), "--server", fake.url]) == 0
    finally:
        fake.close()
    loads = [body["kwargs"]["weights_path"] for path, body in fake.calls if path == "/collective_rpc"]
    assert loads == [str(base / "small")]
    assert sum(body["sampling_params"]["n"] for body in fake.asked()) == 3 * NUM_ANSWERS
    graded = [json.loads(line) for line in (tmp_path / "graded.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["graded"][0]["answers"] for line in graded] == [NUM_ANSWERS] * 3


def test_an_answer_that_a_server_gave_up_is_masked(base: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    asked = {"messages": [{"role": "user", "content": "Read it."}], "domain": "reading", "answer": "e a o i t n r s l d"}
    prompts.write_text(json.dumps(asked | {"id": "0"}) + "\n", encoding="utf-8")
    fake = FakeVllm()

    def aborts(path: str, body: Any, number: int) -> tuple[int, Any] | None:
        if "generate" not in path or "n" not in body["sampling_params"]:
            return None
        reply = fake.generate(body)
        choice = reply["choices"][0]
        choice["finish_reason"], last = "abort", choice["token_ids"].pop()
        assert choice["logprobs"]["content"].pop()["token_id"] == last
        return 200, reply

    fake.override = aborts
    try:
        arguments = ["grade", str(prompts), "--out", str(tmp_path / "graded.jsonl"), "--config", str(base / "rl.yaml")]
        assert (
            cli.main([*arguments, "grading.drop_unsolvable=false", "--model", str(base / "small"), "--server", fake.url]) == 0
        )
    finally:
        fake.close()
    [line] = [json.loads(line) for line in (tmp_path / "graded.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (line["graded"][0]["answers"], line["graded"][0]["masked"]) == (NUM_ANSWERS - 1, 1)


def command(base: Path, name: str, *options: str, models: tuple[str, ...] = ("small", "other")) -> list[str]:
    named = [word for model in models for word in ("--model", str(base / model))]
    return ["grade", str(base / "prompts/prompts.jsonl"), "--out", str(base / name / "graded.jsonl"), *named,
            "--config", str(base / "rl.yaml"), "--max-answers", "16", *options]  # fmt: skip


def lines(path: Path) -> dict[str, dict[str, Any]]:
    return {line["id"]: line for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def graded(base: Path, name: str) -> tuple[str, str]:
    return tuple((base / name / file).read_text(encoding="utf-8") for file in ("graded.jsonl", "graded.dropped.jsonl"))


def recount(base: Path, name: str, number: int, keys: list[str]) -> dict[str, list[bool | None]]:
    """Whether each answer is right, sampled for one prompt at a time from weights that transformers loads."""
    config, chat = load_grade([str(base / "rl.yaml")], {}), Chat(base / name)
    files = PromptFiles([PromptSourceConfig(path=base / "prompts/prompts.jsonl")], config.rewards)
    engine = EmbeddedEngine(SHAPE, sampling_in_ids(config.sampling, config.force_answer, SHAPE, chat))
    engine.update_weights(oracle.random_model("digits", number).state_dict().items(), version=0)
    reader, tasks, found = PromptReader(chat, SHAPE), {task.key: task for task in files.tasks}, {}
    with Rewarder(config.rewards) as rewarder:
        for key in keys:
            prompt = reader.read(tasks[key], files.sample(key))
            seed = np.random.SeedSequence([0, number, zlib.crc32(key.encode())]).generate_state(1, np.uint32)[0]
            [(_, rollouts)] = engine.generate([Request(prompt, NUM_ANSWERS, int(seed))])
            found[key] = [rewarder.submit(tasks[key], rollout.text).result().correct for rollout in rollouts]
    reader.close()
    return found


def test_pass_rates_are_those_of_the_models_answers(base: Path) -> None:
    kept, dropped = (lines(base / "known" / name) for name in ("graded.jsonl", "graded.dropped.jsonl"))
    everything = kept | dropped
    keys = [f"prompt-{number}" for number in range(0, 16, 2)] + ["text"]
    counts = [recount(base, name, number, keys) for number, name in enumerate(("small", "other"))]
    rates = set()
    for key in keys:
        right = [sum(found[key]) for found in counts]
        rate = sum(right) / 2 / NUM_ANSWERS
        line = everything[key]
        assert [one["right"] for one in line["graded"]] == right
        assert line["pass_rate"] == pytest.approx(rate, abs=1e-6)
        assert line["tier"] == TIERS[tier_of(rate, (0.1, 0.35, 0.65, 0.9))]
        assert line["pass@4"] == pytest.approx(sum(pass_at_k(NUM_ANSWERS, one, 4) for one in right) / 2, abs=1e-6)
        assert (line["id"] in dropped) == (rate in (0, 1))
        rates.add(rate)
    assert len(rates) > 3, "prompts of one difficulty test nothing"


def test_what_is_dropped_and_what_is_kept(base: Path) -> None:
    kept, dropped = (lines(base / "known" / name) for name in ("graded.jsonl", "graded.dropped.jsonl"))
    assert {key: dropped[key]["dropped"] for key in ("unsolvable", "missing")} == {
        "unsolvable": "unsolvable", "missing": "unreadable"}  # fmt: skip
    assert "nowhere.png" in dropped["missing"]["fault"]
    assert "pass_rate" not in dropped["missing"]
    for one in (kept | dropped)["no judge"]["graded"]:  # gates judge some of its answers
        assert one["right"] == 0
        assert one["masked"] > 0
        assert one["answers"] + one["masked"] == NUM_ANSWERS
    assert (kept | dropped)["text"]["note"] == "kept \U0001f600"
    assert not kept.keys() & dropped.keys()
    report = json.loads((base / "known/graded.report.json").read_text(encoding="utf-8"))
    assert report["unusable_lines"] == {"no answer": 1}
    assert sum(found["prompts"] for found in report["domains"].values()) == len(kept) + len(dropped) == 20
    assert report["domains"]["math"] == {"prompts": 1, "unsolvable": 1, "pass_rate": 0, "pass_at_k": 0}
    assert not (base / "known/graded.partial").exists()
    again = PromptFiles([PromptSourceConfig(path=base / "known/graded.jsonl")], load_grade([str(base / "rl.yaml")], {}).rewards)
    assert again.offline == {key: line["pass_rate"] for key, line in kept.items() if "pass_rate" in line}
    for key in again.offline:
        for item in again.sample(key).media():
            assert (base / "known" / item.value).is_file(), "a picture that moved away from its prompt"


def test_a_killed_run_continues_to_the_same_files(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command(base, "killed")
    process = subprocess.Popen(
        [sys.executable, "-m", "data_tools", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    counts = base / "killed/graded.partial/counts-0-of-1.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (counts.exists() and counts.read_bytes().count(b"\n") >= 3):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    known = counts.read_bytes()
    assert 3 <= known.count(b"\n") < 40
    counts.write_bytes(known + b'{"model": 1, "key": "tri')
    assert cli.main(command(base, "killed", "--seed", "1")) == 1
    assert "was begun with other settings (seed)" in capsys.readouterr().err
    assert cli.main(words) == 0
    assert graded(base, "killed") == graded(base, "known")
    capsys.readouterr()
    shown = (base / "killed/graded.jsonl").stat().st_mtime_ns
    assert cli.main(words) == 0
    assert "20 prompts" not in capsys.readouterr().err
    assert (base / "killed/graded.jsonl").stat().st_mtime_ns == shown, "a complete job was done again"


def test_parts_join(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("2/3", "0/3"):
        assert cli.main(command(base, "parts", "--part", part)) == 0
        assert f"part {part} is done; other parts have" in capsys.readouterr().out
        assert not (base / "parts/graded.jsonl").exists()
    assert cli.main(command(base, "parts", "--part", "1/3")) == 0
    table = capsys.readouterr().out
    assert graded(base, "parts") == graded(base, "known")
    assert "pass@4" in table
    assert "1 lines could not be used and are in neither: no answer 1" in table
    # One part again as a whole: nothing is left, so the other files of counts are used.
    assert cli.main(command(base, "parts")) == 0


def rollouts(base: Path, run: str, rewards: dict[str, list[float | None]], *, question: str = "Read it.") -> Path:
    groups = []
    for key, values in rewards.items():
        empty = Rollout(np.zeros(1, np.int64), np.zeros(1, np.float32), np.zeros(1, bool), "stop", "text")
        answers = tuple(Answer(empty, Reward(value, None if value is None else value == 1, "")) for value in values)
        answer = "41" if key == "unsolvable" else "e a o i t n r s l d"
        domain = {"text": "reading", "unsolvable": "math"}.get(key, "general")
        groups.append(Group(Prompt(Task(key, domain, question, answer), np.zeros(1, np.int64)), answers))
    path = rollout_file(base / run, 1)
    write_rollouts(path, 1, groups, set(), group_advantages(groups, AlgorithmConfig()), ["medium"] * len(groups))
    return path


def test_rollouts_are_graded_without_a_model(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = rollouts(base, "run1", {"text": [1, 1, 0, None], "unsolvable": [0, 0], "no judge": [1, 1, 1]})
    second = rollouts(base, "run2", {"text": [1], "unsolvable": [0, 0.5], "elsewhere": [1]})
    third = rollouts(base, "run3", {"text": [0] * 9}, question="Something else?")
    files = ["--rollouts", *map(str, (first, second, third))]
    assert cli.main(command(base, "rolled", *files, models=())) == 0
    assert "2 groups of other prompts left out" in capsys.readouterr().err
    kept, dropped = (lines(base / "rolled" / name) for name in ("graded.jsonl", "graded.dropped.jsonl"))
    assert kept["text"]["graded"] == [{"model": "rollouts", "answers": 4, "right": 3, "masked": 1}]
    assert (kept["text"]["pass_rate"], kept["text"]["tier"]) == (0.75, "easy")
    assert dropped.keys() == {"unsolvable"}
    assert "pass_rate" not in kept["no judge"], "three answers are fewer than grading.min_answers"
    assert len(kept) == 19
    rules = [*command(base, "rules", *files, models=())]
    rules[rules.index("--config") + 1 : rules.index("--config") + 2] = [str(base / "rl.yaml"), "grading.drop_unsolvable=false",
                                                                        "grading.min_answers=3"]  # fmt: skip
    assert cli.main(rules) == 0
    kept, dropped = (lines(base / "rules" / name) for name in ("graded.jsonl", "graded.dropped.jsonl"))
    assert kept["unsolvable"]["tier"] == "very_hard"
    assert {key: line["dropped"] for key, line in dropped.items()} == {"no judge": "trivial"}
    broken = base / "broken.jsonl"
    broken.write_text('{"key": "trivial"}\n', encoding="utf-8")
    assert cli.main(command(base, "broken", "--rollouts", str(broken), models=())) == 1
    assert "broken.jsonl, line 1: no group of rollouts" in capsys.readouterr().err


def test_what_could_not_be_judged_is_asked_again(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run stops above the share of masked answers, keeps what it counted, and tries masked prompts again."""
    path = base / "judged.jsonl"
    asked = {"messages": [{"role": "user", "content": "Read it."}], "answer": "seven"}
    path.write_text("".join(json.dumps(asked | {"id": name, "domain": name}) + "\n" for name in ("general", "reading")))
    words = command(base, "judged", models=("small",))
    words[1] = str(path)
    assert cli.main(words) == 1
    assert "could not be judged, more than max_masked_share 0.25: no_judge" in capsys.readouterr().err
    counts = [json.loads(line) for line in (base / "judged/graded.partial/counts-0-of-1.jsonl").read_bytes().splitlines()]
    assert [(count["key"], count["masked"] > 0) for count in counts] == [("general", True), ("reading", False)]
    judged = counts[0]["answers"]
    counts[0] |= {"answers": 0, "masked": NUM_ANSWERS}
    counts[1]["right"] = counts[1]["answers"] = 5  # what is counted is not counted again
    (base / "judged/graded.partial/counts-0-of-1.jsonl").write_text("".join(json.dumps(count) + "\n" for count in counts))
    words[words.index("--config") + 1 : words.index("--config") + 2] = [str(base / "rl.yaml"), "rewards.max_masked_share=1"]
    assert cli.main(words) == 0
    assert lines(base / "judged/graded.dropped.jsonl")["reading"]["graded"][0]["answers"] == 5
    again = (lines(base / "judged/graded.jsonl") | lines(base / "judged/graded.dropped.jsonl"))["general"]["graded"][0]
    assert 0 < again["answers"] == judged == NUM_ANSWERS - again["masked"]
    assert "could not be judged" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda base, words: [*words[:4]], "nothing to grade with; give --model"),
        (lambda base, words: [*words, "--model", str(base / "prompts")], "weights are read from safetensors only"),
        (lambda base, words: [*words, "--processor", str(base / "prompts")], "--processor"),
        (lambda base, words: [words[0], str(base / "none.jsonl"), *words[2:]], "none.jsonl: cannot be read"),
        (lambda base, words: [*words[:3], words[1], *words[4:]], "is the file of the prompts; give another --out"),
        (lambda base, words: [*words[:3], str(base / "taken.jsonl"), *words[4:]], "is no output of this tool"),
        (lambda base, words: [*words, "--answers", "1"], "sampling.group_size"),
        (lambda base, words: [*words, "--max-tokens", "99999999"], "lower --max-tokens"),
        (lambda base, words: [*words, "--max-bad-share", "2"], "--max-bad-share from 0 to 1"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(base: Path, change: Any, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    (base / "taken.jsonl").write_text("{}\n")
    shutil.rmtree(base / "refused", ignore_errors=True)
    assert cli.main(change(base, command(base, "refused"))) == 1
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_weights_come_from_the_folder(base: Path) -> None:
    model, config = Model(base / "other"), load_grade([], {})
    engine = open_engine(model, sampling_in_ids(config.sampling, config.force_answer, SHAPE, model.open_chat()))
    expected = oracle.random_model("digits", 1).state_dict()
    held = dict(engine._model.named_parameters())
    assert all(torch.equal(held[name], expected[name]) for name in held)
    assert len(list((base / "other").glob("*.safetensors"))) > 1
