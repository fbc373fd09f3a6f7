"""The trained tokenizer: GLM's special tokens at fixed ids, one result from every file of the folder, any text survives."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

import megatron_glmv.config
from data_tools import cli, train_tokenizer

PRESET = Path(megatron_glmv.config.__file__).parent / "presets" / "digits.json"
TEXTS = ["Read the digits.", "How many digits are there?", "What is the sum of the digits?", "4 0 7 3", "Where is the digit 7?",
         "<|begin_of_box|>[[12,345,678,999]]<|end_of_box|>", "<think>four and three</think><answer>7</answer>"]  # fmt: skip
ALPHABET = [*"abcdefgh  \n\t0123456789.,?[]", "é", "Ω", "数", "字", "🙂", "\u200b", "the", " digits", *train_tokenizer.SPECIALS,
            *train_tokenizer.VISIBLE_SPECIALS, "<unk>", "<0x41>", "<unused_1>", "<|", "|>", "]]", "oo"]  # fmt: skip


def write_corpus(path: Path, texts: list[str] = TEXTS) -> Path:
    lines = [{"id": str(i), "messages": [{"role": "assistant", "content": text}]} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("tokenizer")
    corpus = write_corpus(base / "corpus.jsonl")
    assert cli.main(["train-tokenizer", str(base / "processor"), "--input", str(corpus), "--min-pixels", "1568"]) == 0
    return base / "processor"


def test_ids_are_those_of_the_digits_preset(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads(PRESET.read_text(encoding="utf-8"))
    named = {"<|image|>": "image_token_id", "<|video|>": "video_token_id", "<|begin_of_image|>": "image_start_token_id",
             "<|end_of_image|>": "image_end_token_id", "<|begin_of_video|>": "video_start_token_id",
             "<|end_of_video|>": "video_end_token_id"}  # fmt: skip
    for special, key in named.items():
        assert tokenizer.convert_tokens_to_ids(special) == config[key]
    stops = ["<|endoftext|>", "<|user|>", "<|observation|>", "</answer>"]
    assert tokenizer.convert_tokens_to_ids(stops) == config["text_config"]["eos_token_id"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == config["text_config"]["pad_token_id"] == 1
    assert len(tokenizer) == config["text_config"]["vocab_size"] == 384
    expected = ["<unk>", *train_tokenizer.SPECIALS, *train_tokenizer.VISIBLE_SPECIALS]
    assert tokenizer.convert_ids_to_tokens(list(range(23))) == expected
    assert tokenizer.convert_ids_to_tokens([23, 278]) == ["<0x00>", "<0xFF>"]


def test_transformers_and_sentencepiece_give_the_same_ids(folder: Path) -> None:
    fast = AutoTokenizer.from_pretrained(folder)
    slow = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    draw = random.Random(0)
    texts = [*train_tokenizer.PROBES, *TEXTS]
    texts += ["".join(draw.choices(ALPHABET, k=draw.randint(1, 30))) for _ in range(2000)]
    texts += ["".join(chr(draw.choice((draw.randrange(1, 0xD800), draw.randrange(0xE000, 0x110000)))) for _ in range(20))
              for _ in range(200)]  # fmt: skip
    for text in texts:
        ids = slow.encode(text)
        assert fast(text, add_special_tokens=False)["input_ids"] == ids, text
        assert fast.decode(ids) == text.replace("\u2581", " ")


def test_digits_are_single_tokens_and_box_tokens_stay_in_decoded_text(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    ids = tokenizer("<|user|><|begin_of_box|>[[1,22,3,4]]<|end_of_box|><|endoftext|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<|begin_of_box|>[[1,22,3,4]]<|end_of_box|>"


def test_unused_pieces_fill_the_vocabulary_and_training_is_deterministic() -> None:
    models = [train_tokenizer.train_sentencepiece(TEXTS, 600) for _ in range(2)]
    assert models[0] == models[1]
    pieces = sentencepiece.SentencePieceProcessor(model_proto=models[0])
    assert pieces.get_piece_size() == train_tokenizer.build_fast_tokenizer(models[0]).get_vocab_size() == 600
    assert pieces.id_to_piece(599).startswith("<unused_")
    assert 599 not in pieces.encode(pieces.id_to_piece(599))


def test_a_difference_between_the_tokenizers_is_found() -> None:
    model = train_tokenizer.train_sentencepiece(TEXTS, 384)
    other = train_tokenizer.build_fast_tokenizer(train_tokenizer.train_sentencepiece(TEXTS, 320))
    with pytest.raises(ValueError, match=r"different ids for 'Read the digits\.'"):
        train_tokenizer.check_equal(model, other, TEXTS)


@pytest.mark.parametrize(("size", "message"), [("279", "alone take 279"), ("285", "raise --vocab-size")])
def test_a_vocabulary_without_room_is_one_clear_line(
    size: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    assert cli.main(["train-tokenizer", str(tmp_path / "out"), "--input", str(corpus), "--vocab-size", size]) == 1
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
