"""Prompts from files: every fault counted by its reason, and the tokens and pixels of Hugging Face's processor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_glmv.config.prompts import PromptSourceConfig
from megatron_glmv.config.rewards import RewardsConfig
from megatron_glmv.data.chat import Chat
from megatron_glmv.rl.prompt_reader import BadPromptError, PromptReader
from megatron_glmv.rl.prompts import PromptError, PromptFiles
from tests.data.processor import write_processor
from tests.model import oracle
from tests.rl.prompt_files import REFERENCE, write_prompts

REWARDS = RewardsConfig()
GOOD = {"id": "a", "messages": [{"role": "user", "content": "1 + 1?"}], "domain": "math", "answer": "2"}
FAULTS = {
    "not a JSON object": "[1, 2]",
    "no domain": {**GOOD, "domain": None},
    "no such domain": {**GOOD, "domain": "astrology"},
    "no answer": {**GOOD, "answer": None},
    "the same id twice": GOOD,
    "no list of messages": {**GOOD, "id": "b", "messages": []},
    "no question of the user to answer": {**GOOD, "id": "c", "messages": [{"role": "system", "content": "Be brief."}]},
}


def files_of(folder: Path, lines: list[object], **settings: float) -> PromptFiles:
    path = folder / "prompts.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return PromptFiles([PromptSourceConfig(path=path)], REWARDS, **settings)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return Chat(write_processor(tmp_path_factory.mktemp("processor"), min_pixels=1568))


@pytest.mark.parametrize("reason", FAULTS)
def test_a_line_that_cannot_be_used_is_counted(tmp_path: Path, reason: str) -> None:
    # The first file's prompt and its repetition under the file's name are both taken by then.
    files = files_of(tmp_path, [GOOD, GOOD, FAULTS[reason]])
    assert files.skipped == {reason: 1}
    assert [task.key for task in files.tasks] == ["a", "prompts.jsonl:a"]


def test_an_open_question_needs_no_answer(tmp_path: Path) -> None:
    files = files_of(tmp_path, [{**GOOD, "domain": "general", "answer": None, "pass_rate": 0.25}])
    assert files.tasks[0].answer is None
    assert files.offline == {"a": 0.25}


def test_many_bad_lines_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"11 of 12 lines cannot be used.*no answer 11; for instance .*line 2: no answer"):
        files_of(tmp_path, [GOOD, *({**GOOD, "id": str(i), "answer": None} for i in range(11))])
    with pytest.raises(PromptError, match="hold no prompts"):
        files_of(tmp_path, [])
    with pytest.raises(PromptError, match="cannot be read"):
        PromptFiles([PromptSourceConfig(path=tmp_path / "none.jsonl")], REWARDS)


def test_the_model_reads_what_transformers_would(tmp_path: Path, chat: Chat) -> None:
    files = PromptFiles([PromptSourceConfig(path=write_prompts(tmp_path))], REWARDS)
    reader = PromptReader(chat, oracle.model_shape("digits"))
    for task in files.tasks[:3]:
        prompt = reader.read(task, files.sample(task.key), files=True)
        messages = [
            {"role": message.role, "content": [{"type": item.kind, item.kind: item.value} for item in message.content]}
            for message in files.sample(task.key).messages
        ]
        text = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        collapsed = prompt.tokens[np.append(True, (np.diff(prompt.tokens) != 0) | (prompt.tokens[1:] != chat.image_token))]
        written = chat.tokenizer.decode(collapsed, skip_special_tokens=False)
        if not any(file.kind == "video" for file in prompt.files):
            assert written == text
        assert written.endswith(text[-20:])
        assert "left out" not in written
        num_patches = sum(rows * columns for rows, columns in prompt.frames)
        assert (prompt.tokens == chat.image_token).sum() == num_patches // 4
        assert (prompt.patches is None) == (not prompt.frames)
        if prompt.patches is not None:
            assert prompt.patches.shape == (num_patches, 1176)
            assert prompt.patches.dtype == torch.uint8
        assert sum(file.num_frames for file in prompt.files) == len(prompt.frames)
        assert task.answer == REFERENCE
    with pytest.raises(BadPromptError, match=r"prompt 'missing': .*nowhere.png"):
        reader.read(files.tasks[-1], files.sample("missing"))
    reader.close()


def test_a_file_that_changed_is_noticed(tmp_path: Path) -> None:
    files = files_of(tmp_path, [GOOD])
    (tmp_path / "prompts.jsonl").write_text("gone\n", encoding="utf-8")
    with pytest.raises(PromptError, match="has changed since the run started"):
        files.sample("a")
