"""The evaluation of an exported folder: batches change no answer, a folder that lacks a tensor is refused, scores are right."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples import quickstart_evaluate as evaluation
from tests.examples.samples import NUM_SAMPLES, read_eval


def test_batched_answers_equal_unbatched_ones(data, hf_folder):
    batched = evaluation.evaluate(hf_folder, data / "raw" / "eval.jsonl", NUM_SAMPLES, batch=8)
    alone = evaluation.evaluate(hf_folder, data / "raw" / "eval.jsonl", NUM_SAMPLES, batch=1)
    assert batched["answers"] == alone["answers"]
    assert len(set(batched["answers"].values())) > 1, "the pictures do not matter"
    assert sum(task["samples"] for task in batched["tasks"].values()) == NUM_SAMPLES


def test_batches_mix_prompt_lengths(data, hf_folder):
    """Otherwise the test above would not see the padding."""
    answerer = evaluation.Answerer(hf_folder)
    questions = [answerer.prepare(sample, data / "raw") for sample in read_eval(data)]
    groups = list(evaluation.batches(questions, 8))
    assert all(len({(q.kind, q.sample["task"] == "watch", tuple(q.grid[0].tolist())) for q in group}) == 1 for group in groups)
    assert {group[0].kind for group in groups} == {"image", "video"}
    assert sorted(q.sample["id"] for group in groups for q in group) == sorted(q.sample["id"] for q in questions)
    assert any(len({len(q.ids) for q in group}) > 1 for group in groups)


def test_a_batch_holds_one_kind_of_medium():
    """A clip of one digit is as large as a picture of one."""
    grid = torch.tensor([[1, 2, 2]])
    questions = [
        evaluation.Question({"id": kind, "task": "read"}, kind, Path(kind), [1], torch.zeros(4, 1), grid)
        for kind in ("image", "video", "image")
    ]
    assert [len(group) for group in evaluation.batches(questions, 8)] == [2, 1]


def test_folder_without_a_bias_is_refused(hf_folder, tmp_path):
    """Transformers itself only warns and fills the tensor with random numbers."""
    broken = tmp_path / "broken"
    shutil.copytree(hf_folder, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.language_model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"missing_keys.*layers\.1\.self_attn\.k_proj\.bias"):
        evaluation.Answerer(broken)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("<|begin_of_box|>[[0,0,10,10]]<|end_of_box|>", "[[0,0,10,10]]", 1.0),
        ("[[0,0,10,10]]", "[[5,0,15,10]]", 1 / 3),
        ("[[0,0,10,10]]", "[[10,0,20,10]]", 0.0),
        ("[[10,10,0,0]]", "[[0,0,10,10]]", 0.0),
        ("[[0,0,0,0]]", "[[0,0,0,0]]", 0.0),
        ("seven", "[[0,0,10,10]]", 0.0),
        ("[[0,0,10]]", "[[0,0,10,10]]", 0.0),
    ],
)
def test_box_overlap(first, second, expected):
    assert evaluation.box_overlap(first, second) == pytest.approx(expected)


def _sample(task, question, answer):
    asked = [{"type": "image", "image": "x.png"}, {"type": "text", "text": question}]
    written = [{"type": "text", "text": answer}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": written}]
    return {"id": answer, "task": task, "answer": ["what a verifier reads"], "messages": messages}


def test_scores_and_chance_levels():
    """Chance: two kinds of counting questions, the best constant of each is right on 2 of 3 and on 1 of 1."""
    counts = [("How often does 3 appear?", "1"), ("How often does 4 appear?", "1"), ("How often does 9 appear?", "2")]
    samples = [_sample("count", *count) for count in [*counts, ("How many digits are there?", "5")]]
    samples += [_sample("point", "Where is the digit 1?", box) for box in ("[[0,0,10,10]]", "[[1,0,11,10]]", "[[90,90,99,99]]")]
    found = evaluation.score(samples, ["1", "2", "2", "5", "[[0,0,9,10]]", "[[50,50,60,60]]", "none"])
    assert found["count"] == {"accuracy": 0.75, "chance": 0.75, "samples": 4}
    assert found["point"]["accuracy"] == pytest.approx(1 / 3)
    assert found["point"]["chance"] == pytest.approx(2 / 3)


def test_answers_are_greedy_and_stop_at_the_end_tokens(data, hf_folder):
    answerer = evaluation.Answerer(hf_folder)
    assert answerer.model.generation_config.eos_token_id == [1, 8, 10, 22]
    with torch.no_grad():
        answerer.model.lm_head.weight[1] = 100.0 * answerer.model.lm_head.weight[1].sign()
        answerer.model.lm_head.weight[8] = -answerer.model.lm_head.weight[1]
    for kind in ("read", "watch"):
        sample = next(sample for sample in read_eval(data) if sample["task"] == kind)
        assert answerer.answer([answerer.prepare(sample, data / "raw")], 30) == [""]
