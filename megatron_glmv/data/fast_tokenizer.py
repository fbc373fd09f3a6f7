"""A SentencePiece model as a fast tokenizer of the `tokenizers` library, and the comparison of both.

A trainer that reads tokenizer.model and an engine that reads tokenizer.json must see the same ids, so nothing is written that
was not compared: kinds of models whose rules the fast library cannot follow are found by comparing, and refused.

Control symbols (<s>, </s>) are the one intended difference: SentencePiece never reads them out of a text, transformers always
does, and an exported folder is read by transformers.

Source: sentencepiece 0.2.3, src/normalizer.cc, bpe_model.cc, unigram_model.cc and sentencepiece_processor.cc; tokenizers 0.23,
models BPE and Unigram; transformers 5.23.0, tokenization_utils_sentencepiece.py (merges from SentencePiece's scores).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from megatron_glmv.config.base import InputError

SPECIALS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>",
)  # fmt: skip
"""GLM's special tokens, left out when text is decoded without special tokens."""
END = "<|endoftext|>"
SPACE = "\u2581"
"""How SentencePiece writes a space."""
PROBES = (
    "", " ", "  two  spaces ", "line\nbreak\n\n\tand tab\r\n", "0123456789 10 007 3.14", "你好，世界。数字七", "naïve café",
    "Ωμέγα 🙂👍🏽 👩‍👩‍👧", "a<|user|>b <|image|><|image|> [gMASK]<sop>", "<think> x </think><answer>7</answer>",
    "<|begin_of_box|>[[1,22,333,999]]<|end_of_box|>", "<unk> <0x0A> <|unknown|> <unused_0>", "\x00\x7f\ufeff\u200b", "ooo 000",
    "def f(x):\n    return x ** 2  # half\n", "안녕하세요 مرحبا שלום नमस्ते สวัสดี",
    "ﬁ ½ ＡＢＣ １２３ é é", "<|user|>", " <|user|> ",
)  # fmt: skip
"""Texts on which every conversion is compared."""
NUM_PROBED_PIECES = 2000
_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_IMPROBABLE = -1e6
"""The score that keeps a unigram piece out of every segmentation that has another way."""


class TokenizerError(InputError):
    """A tokenizer that cannot be used; one line that names the file or the text at fault."""


def read_model(model: bytes, where: str) -> Any:
    """The parsed SentencePiece model.

    Raises:
        TokenizerError: not one.
    """
    try:
        parsed = sentencepiece_model_pb2.ModelProto.FromString(model)
    except DecodeError as error:
        raise TokenizerError(f"{where}: not a SentencePiece model ({error})") from None
    if not parsed.pieces:
        raise TokenizerError(f"{where}: not a SentencePiece model (it has no pieces)")
    return parsed


def build_fast_tokenizer(model: bytes, where: str = "tokenizer.model") -> Tokenizer:
    """The tokenizer of the `tokenizers` library that gives the ids of a SentencePiece model.

    Args:
        model: the serialised BPE or unigram model.
        where: names the model in errors.

    Raises:
        TokenizerError: not a SentencePiece model, or one of another kind.
    """
    parsed = read_model(model, where)
    kind = _KINDS.get(parsed.trainer_spec.model_type, "unknown")
    if kind not in ("bpe", "unigram"):
        raise TokenizerError(f"{where}: a SentencePiece model of kind {kind}; only bpe and unigram have a fast tokenizer")
    if (rule := _unusable_rule(parsed)) is not None:
        raise TokenizerError(
            f"{where}: trained with {rule}, which no fast tokenizer follows exactly; train it again without, or give a folder "
            "with tokenizer.json"
        )
    tokenizer = Tokenizer(_bpe(parsed) if kind == "bpe" else _unigram(parsed))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    symbols = [piece for piece in parsed.pieces if piece.type in (piece.USER_DEFINED, piece.CONTROL)]
    special = [p.piece for p in symbols if p.type == p.CONTROL or p.piece in SPECIALS]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    plain = [p.piece for p in symbols if p.piece not in special]
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in plain])
    return tokenizer


def _bpe(parsed: Any) -> models.BPE:
    """Merges are ranked by the score of what they give, as SentencePiece picks them."""
    normal = {piece.piece: piece.score for piece in parsed.pieces if piece.type == piece.NORMAL}
    merges = []
    for piece, score in normal.items():
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        merges += [(score, left, right) for left, right in cuts if left in normal and right in normal]
    merges.sort(key=lambda merge: -merge[0])
    return models.BPE(
        {piece.piece: number for number, piece in enumerate(parsed.pieces)},
        [(left, right) for _, left, right in merges],
        unk_token=_unknown(parsed),
        byte_fallback=parsed.trainer_spec.byte_fallback,
        fuse_unk=True,
    )


def _unigram(parsed: Any) -> models.Unigram:
    reachable = (1, 4)  # NORMAL, USER_DEFINED: the only pieces that SentencePiece finds in a text
    pieces = [(piece.piece, piece.score if piece.type in reachable else _IMPROBABLE) for piece in parsed.pieces]
    names = [piece.piece for piece in parsed.pieces]
    return models.Unigram(pieces, names.index(_unknown(parsed)), parsed.trainer_spec.byte_fallback)


def _unknown(parsed: Any) -> str:
    return next(piece.piece for piece in parsed.pieces if piece.type == piece.UNKNOWN)


def _unusable_rule(parsed: Any) -> str | None:
    """A rule about the ends of the text, which a fast tokenizer has already cut at special tokens, or about characters.

    The fast library's normalization with the same table works on grapheme clusters and differs in line ends and accents.
    """
    rules = parsed.normalizer_spec
    found = {
        f"normalization_rule_name={rules.name}": bool(rules.precompiled_charsmap),
        "add_dummy_prefix": rules.add_dummy_prefix,
        "remove_extra_whitespaces": rules.remove_extra_whitespaces,
        "treat_whitespace_as_suffix": parsed.trainer_spec.treat_whitespace_as_suffix,
        "escape_whitespaces=false": not rules.escape_whitespaces,
    }
    return next((rule for rule, used in found.items() if used), None)


def check_equal(model: bytes, fast: Tokenizer, texts: Iterable[str]) -> int:
    """Compare both tokenizers: the ids of every text, and the text of those ids.

    Returns:
        How many texts were compared.

    Raises:
        TokenizerError: the first text on which they differ.
    """
    slow = sentencepiece.SentencePieceProcessor(model_proto=model)
    count = 0
    for text in texts:
        ids = slow.encode(text)
        if fast.encode(text, add_special_tokens=False).ids != ids:
            raise TokenizerError(f"the fast tokenizer and tokenizer.model give different ids for {text[:80]!r}")
        decoded, expected = fast.decode(ids, skip_special_tokens=False), slow.decode(ids)
        if slow.unk_id() not in ids and decoded != expected:
            raise TokenizerError(f"the fast tokenizer writes {expected[:80]!r} back as {decoded[:80]!r}")
        count += 1
    return count


def convert_sentencepiece(model: bytes, where: str) -> Tokenizer:
    """A fast tokenizer that was compared with its SentencePiece model on `PROBES` and on pieces of the model itself.

    Args:
        model: the serialised model.
        where: names it in errors.

    Raises:
        TokenizerError: the model cannot be read, or no fast tokenizer gives the same ids.
    """
    fast, pieces = build_fast_tokenizer(model, where), read_model(model, where).pieces
    written = [piece.piece.replace(SPACE, " ") for piece in pieces if piece.type == piece.NORMAL]
    apart = [piece.piece for piece in pieces if piece.type in (piece.BYTE, piece.UNKNOWN)]
    sample = written[:: max(1, len(written) // NUM_PROBED_PIECES)]
    try:
        check_equal(model, fast, [*PROBES, *sample, *map(" ".join, zip(sample, sample[1:], sample[2:], strict=False)), *apart])
    except TokenizerError as error:
        raise TokenizerError(f"{where}: no equivalent fast tokenizer: {error}; give a folder with tokenizer.json") from None
    return fast


def tokenizer_config(processor_class: str) -> dict[str, Any]:
    """The tree of tokenizer_config.json for a tokenizer with GLM's special tokens."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": processor_class,
        "eos_token": END,
        "pad_token": END,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 17,
        "model_input_names": ["input_ids", "attention_mask"],
        "additional_special_tokens": [special for special in SPECIALS if special != END],
    }
