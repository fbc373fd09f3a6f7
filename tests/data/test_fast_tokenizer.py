"""SentencePiece models of every rule as fast tokenizers: equal ids and texts on a corpus, or one clear refusal."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
import sentencepiece

from megatron_glmv.data.fast_tokenizer import (
    SPECIALS,
    TokenizerError,
    build_fast_tokenizer,
    check_equal,
    convert_sentencepiece,
)

SENTENCES = (
    "Read the digits from left to right, then say their sum.", "What is 12 + 345? It is 357, and 3.14 is less than 22/7.",
    "你好，世界。请问图中有几个数字？", "今日は良い天気ですね。数字は三です。", "안녕하세요, 숫자를 읽어 주세요.",
    "Ωμέγα και άλφα, naïve café über", "Привет, мир! Сколько цифр на картинке?", "مرحبا بالعالم، كم رقما ترى؟", "नमस्ते दुनिया",
    "def total(xs):\n\treturn sum(x ** 2 for x in xs)  # squares", "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0x1F; }",
    "two  spaces   and    four", "🙂👍🏽 👩‍👩‍👧 🇩🇪 emoji", "e\u0301 and ﬁ and ½ and ＡＢＣ",
    "<0xABCDEF_unknown_used|0123456789>",
)  # fmt: skip
SYMBOLS = [*SPECIALS, "<think>", "</think>"]
LOSSLESS: dict[str, Any] = {
    "normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False, "byte_fallback": True,
}  # fmt: skip
RULES: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", **LOSSLESS, "split_digits": True, "control_symbols": ["<s>", "</s>"]},
    "bpe without byte fallback": {"model_type": "bpe", **LOSSLESS, "byte_fallback": False, "character_coverage": 0.98},
    "unigram": {"model_type": "unigram", **LOSSLESS, "character_coverage": 1.0},
}  # fmt: skip


def train(vocab_size: int = 700, **rules: Any) -> bytes:
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in SENTENCES * 20 for line in text.splitlines()]), model_writer=output,
        vocab_size=vocab_size, hard_vocab_limit=False, user_defined_symbols=SYMBOLS, unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1,
        num_threads=1, minloglevel=2, **rules,
    )  # fmt: skip
    return output.getvalue()


def corpus(seed: int = 0, count: int = 3000) -> list[str]:
    """Mixed lines: words of many languages, digits, code, runs of whitespace, special tokens, emoji, any character."""
    draw = random.Random(seed)
    words = [word for text in SENTENCES for word in text.split(" ") if word]
    letters = [letter for text in SENTENCES for letter in text]
    lines = [*SENTENCES]
    while len(lines) < count:
        parts = []
        for _ in range(draw.randint(1, 12)):
            kind = draw.random()
            if kind < 0.5:
                parts.append(draw.choice(words))
            elif kind < 0.65:
                parts.append("".join(draw.choices(letters, k=draw.randint(1, 6))))
            elif kind < 0.75:
                parts.append(str(draw.randrange(10 ** draw.randint(1, 9))))
            elif kind < 0.85:
                parts.append(draw.choice(SYMBOLS))
            elif kind < 0.92:
                parts.append(draw.choice(("  ", "   ", "\n", "\t", "\r\n", " \n ")))
            else:
                parts.append(chr(draw.choice((draw.randrange(0x20, 0xD800), draw.randrange(0xE000, 0x20000)))))
        lines.append(draw.choice(("", " ")).join(parts))
    return lines


@pytest.mark.parametrize("name", RULES)
def test_both_tokenizers_are_equal_on_a_corpus(name: str) -> None:
    model = train(**RULES[name])
    fast = convert_sentencepiece(model, "here/tokenizer.model")
    assert check_equal(model, fast, corpus()) == 3000


def test_text_survives_a_lossless_model() -> None:
    fast = build_fast_tokenizer(train(**RULES["bpe"]))
    for text in corpus(seed=1, count=300):
        assert fast.decode(fast.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_special_tokens_are_single_and_left_out_on_demand() -> None:
    fast = build_fast_tokenizer(train(**RULES["bpe"]))
    encoded = fast.encode("<|user|>\n<think>7</think><|endoftext|></s>", add_special_tokens=False)
    assert encoded.tokens[0] == "<|user|>"
    assert encoded.tokens[-2:] == ["<|endoftext|>", "</s>"], "transformers reads control symbols out of a text"
    assert fast.decode(encoded.ids, skip_special_tokens=True) == "\n<think>7</think>"


@pytest.mark.parametrize(
    ("rules", "part"),
    [
        ({"model_type": "char"}, "a SentencePiece model of kind char; only bpe and unigram"),
        ({"model_type": "bpe", **LOSSLESS, "add_dummy_prefix": True}, "trained with add_dummy_prefix"),
        ({"model_type": "unigram"}, "trained with normalization_rule_name=nmt_nfkc"),
        ({"model_type": "bpe", **LOSSLESS, "remove_extra_whitespaces": True}, "trained with remove_extra_whitespaces"),
        ({"model_type": "bpe", **LOSSLESS, "treat_whitespace_as_suffix": True}, "trained with treat_whitespace_as_suffix"),
        ({"model_type": "bpe", **LOSSLESS, "normalization_rule_name": "nfkc"}, "trained with normalization_rule_name=nfkc"),
    ],
)
def test_models_without_an_equivalent_are_refused_in_one_line(rules: dict[str, Any], part: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        convert_sentencepiece(train(**rules), "here/tokenizer.model")
    message = str(caught.value)
    assert message.startswith("here/tokenizer.model: ")
    assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x80\x04\x95"])
def test_what_is_no_model_is_refused(content: bytes) -> None:
    with pytest.raises(TokenizerError, match=r"^here: not a SentencePiece model"):
        convert_sentencepiece(content, "here")
