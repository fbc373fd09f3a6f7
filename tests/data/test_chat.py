"""Conversations to tokens: transformers' own rendering and grids, only answers and their stops trained, markers refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_glmv.data.chat import Chat, ProcessorError, Thinking, read_image_settings
from megatron_glmv.data.sample import Sample, SampleError, parse_sample
from megatron_glmv.sequence.grid import Grid, PixelLimits, image_grid
from megatron_glmv.sequence.positions import multimodal_positions
from tests.data.processor import write_processor

TWO_TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "You answer briefly."},
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Read the digits."}]},
    {"role": "assistant", "content": [{"type": "text", "text": "4 0"}]},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "image", "image": "b.png"}]},
    {"role": "assistant", "content": "<think>seven</think>7"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_processor(tmp_path_factory.mktemp("chat") / "processor", min_pixels=1568)


@pytest.fixture(scope="module")
def chat(folder: Path) -> Chat:
    return Chat(folder)


def make_sample(messages: list[dict[str, Any]], key: str = "s-1") -> Sample:
    return parse_sample(json.dumps({"id": key, "messages": messages}), "file:1", Path())


def encode_pieces(chat: Chat, *pieces: str) -> list[int]:
    return [token for piece in pieces for token in chat.tokenizer(piece, add_special_tokens=False)["input_ids"]]


def test_the_rendered_text_is_the_templates_and_glms(chat: Chat) -> None:
    text = chat.render(make_sample(TWO_TURNS))
    assert text == chat.tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert text == (
        "[gMASK]<sop><|system|>\nYou answer briefly.<|user|>\n<|begin_of_image|><|image|><|end_of_image|>Read the digits."
        "<|assistant|>\n4 0<|user|>\nAnd <|begin_of_image|><|image|><|end_of_image|><|assistant|>\n<think>seven</think>7"
    )
    asked = make_sample(TWO_TURNS)
    assert chat.render(asked, generation_prompt=True) == text + "<|assistant|>\n"


def test_the_assistants_words_and_what_ends_them_are_trained(chat: Chat) -> None:
    document = chat.encode(make_sample(TWO_TURNS), [Grid(1, 2, 4), Grid(1, 4, 4)])
    parts = [
        ("[gMASK]<sop><|system|>\nYou answer briefly.<|user|>\n<|begin_of_image|>", 0), ("<|image|>" * 2, 0),
        ("<|end_of_image|>Read the digits.<|assistant|>\n", 0), ("4 0<|user|>", 1),
        ("\nAnd <|begin_of_image|>", 0), ("<|image|>" * 4, 0), ("<|end_of_image|><|assistant|>\n", 0),
        ("<think>seven</think>7<|endoftext|>", 1),
    ]  # fmt: skip
    tokens = [encode_pieces(chat, text) for text, _ in parts]
    assert document.tokens.tolist() == [token for part in tokens for token in part]
    weights = [float(weight) for part, (_, weight) in zip(tokens, parts, strict=True) for _ in part]
    assert document.loss_weights.tolist() == weights
    assert (document.frames, document.key) == (((2, 4), (4, 4)), "s-1")
    assert (document.tokens.dtype, document.loss_weights.dtype) == (np.int32, np.float32)
    multimodal_positions(document.tokens == chat.image_token, document.frames)


def test_an_answer_is_a_continuation_of_its_prompt(chat: Chat) -> None:
    """What is not trained at the front is exactly what generation starts from, also when the answer begins with white space."""
    for answer in ("4 0", "\n\n4", " 7", ""):
        sample = make_sample([{"role": "user", "content": "Read."}, {"role": "assistant", "content": answer}])
        document = chat.encode(sample, [])
        first = int(np.flatnonzero(document.loss_weights)[0])
        prompt = encode_pieces(chat, "[gMASK]<sop><|user|>\nRead.<|assistant|>\n")
        assert document.tokens[:first].tolist() == prompt
        assert document.loss_weights[first:].all()
        assert chat.tokenizer.decode(document.tokens[first:]) == answer + "<|endoftext|>"


def test_two_turns_of_the_assistant_in_a_row_do_not_train_the_role_token(chat: Chat) -> None:
    turns = [{"role": "user", "content": "Read."}, {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "0"}]
    document = chat.encode(make_sample(turns), [])
    second = np.flatnonzero(document.tokens == chat.tokenizer.convert_tokens_to_ids("<|assistant|>"))[1]
    assert document.loss_weights[second - 1 :].tolist() == [1, 0, 0, 1, 1]


@pytest.mark.parametrize("marker", ["<|image|>", "<|user|>", "<|endoftext|>", "<|begin_of_image|>", "<|video|>", "[gMASK]"])
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_a_marker_in_a_text_is_refused_by_name(chat: Chat, marker: str, turn: int) -> None:
    messages = [dict(message) for message in TWO_TURNS[:3]]
    messages[turn]["content"] = [{"type": "text", "text": f"look: {marker}"}]
    with pytest.raises(SampleError, match="sample 's-7': a text holds a marker of the chat template") as refused:
        chat.encode(make_sample(messages, "s-7"), [])
    assert marker in str(refused.value)


def test_grids_that_do_not_match_the_images_are_refused(chat: Chat) -> None:
    with pytest.raises(SampleError, match=r"'s-1'.*2 placeholders for 1 images"):
        chat.encode(make_sample(TWO_TURNS), [Grid(1, 2, 4)])


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "sample 'file:1': the line is not JSON"), ("[]", "not a JSON object"),
     ('{"id": "x"}', "sample 'x': no list of messages"),
     ('{"messages": [{"role": "human", "content": ""}]}', "role is not one of system, user, assistant: 'human'"),
     ('{"messages": [{"role": "user", "content": "a"}]}', "the last message is not the assistant's"),
     ('{"messages": [{"role": "assistant", "content": 3}]}', "neither text nor a list"),
     ('{"messages": [{"role": "assistant", "content": [{"type": "audio", "audio": "a"}]}]}', "not text, image or video"),
     ('{"messages": [{"role": "assistant", "content": [{"type": "text"}]}]}', "no string under 'text'"),
     ('{"messages": [{"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]}', "in an assistant's message")],
)  # fmt: skip
def test_a_line_that_is_no_sample_is_named(line: str, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        parse_sample(line, "file:1", Path())


SWITCHING = """\
[gMASK]<sop>
{%- set place = namespace(user=-1) -%}
{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set place.user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for message in messages -%}
    <|{{ message.role }}|>{{ '\\n' }}
    {%- if message.role == 'assistant' -%}
        {%- set thought = message.content.split('</think>')[0].split('<think>')[-1] if '</think>' in message.content else '' -%}
        <think>{{ thought.strip() if loop.index0 > place.user else '' }}</think>{{ '\\n' }}
        {{- message.content.split('</think>')[-1].strip() }}
    {%- else -%}
        {{ message.content }}{{ '/nothink' if message.role == 'user' and enable_thinking is defined and not enable_thinking }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|assistant|>{{ '\\n<think></think>' if enable_thinking is defined and not enable_thinking }}
{%- endif -%}
"""
"""A template that behaves as those of GLM-4.5V and 4.6V: earlier thinking is emptied, and a switch asks for none."""
ASK, AGAIN = {"role": "user", "content": "Read."}, {"role": "user", "content": "And now?"}
THOUGHT, BRIEF = {"role": "assistant", "content": "<think>\nab\n</think>\n4"}, {"role": "assistant", "content": "0"}


@pytest.fixture(scope="module")
def switching(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changed = tmp_path_factory.mktemp("switching") / "processor"
    shutil.copytree(folder, changed)
    (changed / "chat_template.jinja").write_text(SWITCHING)
    return changed


def trained(chat: Chat, messages: list[dict[str, Any]]) -> list[str]:
    """The runs of trained text."""
    document = chat.encode(make_sample(messages), [])
    edges = np.flatnonzero(np.diff([0, *(document.loss_weights > 0), 0]))
    return [chat.tokenizer.decode(document.tokens[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def test_thinking_is_not_kept_in_the_history(chat: Chat) -> None:
    """GLM-4.1V's template keeps it, so it is taken out; an answer without the thoughts that led to it is not trained."""
    messages = [ASK, THOUGHT, AGAIN, THOUGHT]
    assert chat.render(make_sample(messages)) == (
        "[gMASK]<sop><|user|>\nRead.<|assistant|>\n4<|user|>\nAnd now?<|assistant|>\n<think>\nab\n</think>\n4"
    )
    assert trained(chat, messages) == ["<think>\nab\n</think>\n4<|endoftext|>"]
    assert trained(chat, [ASK, BRIEF, AGAIN, THOUGHT]) == ["0<|user|>", "<think>\nab\n</think>\n4<|endoftext|>"]
    asked = [ASK, THOUGHT, AGAIN, BRIEF]
    assert trained(chat, asked) == ["0<|endoftext|>"]


def test_thinking_may_be_kept_in_the_history(folder: Path) -> None:
    chat = Chat(folder, Thinking(keep_earlier=True))
    turn = "<think>\nab\n</think>\n4"
    assert trained(chat, [ASK, THOUGHT, AGAIN, THOUGHT]) == [turn + "<|user|>", turn + "<|endoftext|>"]


@pytest.mark.parametrize("keep", [False, True])
def test_a_template_that_drops_thinking_has_the_last_word(switching: Path, keep: bool) -> None:
    chat = Chat(switching, Thinking(keep_earlier=keep))
    messages = [ASK, THOUGHT, AGAIN, THOUGHT]
    assert chat.render(make_sample(messages)) == (
        "[gMASK]<sop><|user|>\nRead.<|assistant|>\n<think></think>\n4"
        "<|user|>\nAnd now?<|assistant|>\n<think>ab</think>\n4"
    )  # fmt: skip
    assert trained(chat, messages) == ["\n<think>ab</think>\n4<|endoftext|>"]


def test_an_answer_without_thinking_is_asked_for_so(switching: Path) -> None:
    """What is trained follows what generation is given: nothing with thinking, the empty block without."""
    chat = Chat(switching)
    text = "[gMASK]<sop><|user|>\nRead./nothink<|assistant|>\n<think></think>"
    for answer in ("0", "<think></think>\n0", "<think>\n\n</think>\n0"):
        sample = make_sample([ASK, {"role": "assistant", "content": answer}])
        assert chat.render(sample) == text + "\n0"
        assert trained(chat, [ASK, {"role": "assistant", "content": answer}]) == ["\n0<|endoftext|>"]
    assert chat.render(make_sample([ASK, BRIEF]), generation_prompt=True) == text + "\n0<|assistant|>\n<think></think>"
    assert trained(chat, [ASK, BRIEF, AGAIN, BRIEF]) == ["\n0<|user|>", "\n0<|endoftext|>"]
    off = Chat(switching, Thinking(ask_for_none=False))
    assert trained(off, [ASK, BRIEF]) == ["\n<think></think>\n0<|endoftext|>"]


def test_an_empty_think_block_beside_thoughts_is_not_trained(switching: Path) -> None:
    """The template writes it in front of an answer without thoughts; trained, it would teach to skip them when asked."""
    chat, thought = Chat(switching), "\n<think>ab</think>\n4<|endoftext|>"
    messages = [ASK, BRIEF, AGAIN, THOUGHT]
    assert chat.render(make_sample(messages)) == (
        "[gMASK]<sop><|user|>\nRead.<|assistant|>\n<think></think>\n0<|user|>\nAnd now?<|assistant|>\n<think>ab</think>\n4"
    )
    assert trained(chat, messages) == ["\n0<|user|>", thought]
    assert trained(chat, [ASK, BRIEF, AGAIN, BRIEF, AGAIN, THOUGHT]) == ["\n0<|user|>", "\n0<|user|>", thought]
    assert trained(chat, [ASK, THOUGHT, AGAIN, BRIEF]) == ["\n0<|endoftext|>"]
    assert trained(chat, [ASK, BRIEF, THOUGHT]) == ["\n0", thought]
    off = Chat(switching, Thinking(ask_for_none=False))
    assert trained(off, messages) == ["\n<think></think>\n0<|user|>", thought]


def test_a_folder_that_is_no_processor_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ProcessorError, match="no such folder"):
        Chat(tmp_path / "nowhere")
    with pytest.raises(ProcessorError, match="cannot load a tokenizer"):
        Chat(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ProcessorError, match="no chat template"):
        Chat(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes((folder / "chat_template.jinja").read_bytes())
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 3}}')
    with pytest.raises(ProcessorError, match=r"preprocessor_config\.json: no size with shortest_edge"):
        Chat(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ProcessorError, match=r"no preprocessor_config\.json"):
        Chat(tmp_path)


def test_transformers_processor_gives_the_same_tokens_and_grids(folder: Path, torchvision_shim: ModuleType) -> None:
    """The whole way of a user's prompt, pictures included, against AutoProcessor on the same folder; and its saved form."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    sizes = [(28, 224), (56, 112), (30, 45), (20, 333), (100, 100), (300, 171)]
    for first, second in zip(sizes, sizes[::-1], strict=True):
        pictures = [Image.new("RGB", (width, height)) for height, width in (first, second)]
        text = processor.apply_chat_template(TWO_TURNS, tokenize=False)
        batch = processor(text=[text], images=pictures, return_tensors="np")
        grids = [image_grid(height, width, PixelLimits(1568, 9_633_792)) for height, width in (first, second)]
        document = Chat(folder).encode(make_sample(TWO_TURNS), grids)
        assert [[1, rows, columns] for rows, columns in document.frames] == batch["image_grid_thw"].tolist()
        assert document.tokens[:-1].tolist() == batch["input_ids"][0].tolist()
    saved = folder.parent / "saved"
    processor.save_pretrained(saved)
    assert not (saved / "preprocessor_config.json").exists()
    assert read_image_settings(saved) == read_image_settings(folder)
