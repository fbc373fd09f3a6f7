"""`glmv-data train-tokenizer`: a SentencePiece tokenizer with GLM's special tokens, as a Hugging Face processor folder.

The fast tokenizer.json is built from the pieces of the trained model, and the tool compares both on the corpus before it
reports success: an engine that reads one file and a trainer that reads the other must see the same ids.

Source: ids and template of GLM-4.1V-9B-Thinking (its tokenizer_config.json, chat_template.jinja); sentencepiece 0.2.3 (byte
fallback).
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from tqdm import tqdm

from megatron_glmv.data.fast_tokenizer import PROBES, SPACE, SPECIALS, build_fast_tokenizer, check_equal, tokenizer_config
from megatron_glmv.data.sample import parse_sample
from megatron_glmv.sequence.grid import IMAGE_LIMITS, VIDEO_LIMITS

VISIBLE_SPECIALS = ("<|begin_of_box|>", "<|end_of_box|>", "<think>", "</think>", "<answer>", "</answer>")
"""Ids 17 to 22, after `SPECIALS` (1 to 16): single tokens that stay in decoded text, because answers are parsed by them."""
UNKNOWN = "<unk>"
SMALLEST_VOCABULARY = 1 + len(SPECIALS) + len(VISIBLE_SPECIALS) + 256
NUM_COMPARED = 2000
"""Corpus texts on which both tokenizers are compared."""

CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- for message in messages -%}
    <|{{ message.role }}|>{{ '\\n' }}
    {%- if message.content is string -%}
        {{ message.content }}
    {%- else -%}
        {%- for item in message.content -%}
            {%- if item.type == 'video' -%}
                <|begin_of_video|><|video|><|end_of_video|>
            {%- elif item.type == 'image' -%}
                <|begin_of_image|><|image|><|end_of_image|>
            {%- elif item.type == 'text' -%}
                {{ item.text }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|assistant|>{{ '\\n' }}
{%- endif -%}
"""

HELP = """\
Writes OUT/tokenizer.model (SentencePiece), tokenizer.json (the same, fast), tokenizer_config.json, chat_template.jinja,
preprocessor_config.json and video_preprocessor_config.json: a folder that `glmv-data pack --processor`, transformers'
AutoTokenizer and AutoProcessor read.

Ids 0 to 22 are <unk> and GLM's special tokens, 23 to 278 the bytes (so any text can be written), the rest what was
learned: pieces never hold two digits, and unused pieces fill up to --vocab-size, which must equal the model's vocabulary.
Trained on the texts of the messages in the given JSONL files."""


def read_texts(paths: Iterable[Path]) -> Iterator[str]:
    """Every text of every message in JSONL files of samples.

    Raises:
        SampleError: a line that is no sample.
    """
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                for message in parse_sample(line, f"{path.name}:{number}", path.parent).messages:
                    yield from (item.value for item in message.content if item.kind == "text" and item.value)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model in which every text can be written.

    Args:
        texts: the corpus.
        vocab_size: exactly this many pieces come back.

    Returns:
        The serialised model: <unk>, special tokens, 256 bytes, learned pieces, unused pieces.

    Raises:
        ValueError: vocab_size has no room for the specials and bytes, or the corpus is empty or unusable.
    """
    if vocab_size <= SMALLEST_VOCABULARY:
        raise ValueError(f"--vocab-size {vocab_size}: the special tokens and bytes alone take {SMALLEST_VOCABULARY}")
    output = io.BytesIO()
    lines = (line for text in texts for line in _without_specials(text).splitlines() if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=output, model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False,
            user_defined_symbols=[*SPECIALS, *VISIBLE_SPECIALS], unk_id=0, unk_piece=UNKNOWN, bos_id=-1, eos_id=-1, pad_id=-1,
            split_digits=True, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, character_coverage=0.9995, max_sentence_length=1 << 20,
            input_sentence_size=1_000_000, shuffle_input_sentence=True, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        hint = "raise --vocab-size, or give more text"
        raise ValueError(f"SentencePiece cannot train on these texts ({' '.join(str(error).split())}); {hint}") from None
    model = sentencepiece_model_pb2.ModelProto.FromString(output.getvalue())
    lowest = min(piece.score for piece in model.pieces)
    for number in range(vocab_size - len(model.pieces)):
        unused = sentencepiece_model_pb2.ModelProto.SentencePiece.UNUSED
        model.pieces.add(piece=f"<unused_{number}>", score=lowest - 1 - number, type=unused)
    model.trainer_spec.vocab_size = vocab_size
    return model.SerializeToString()


def _without_specials(text: str) -> str:
    for special in (*SPECIALS, *VISIBLE_SPECIALS):
        text = text.replace(special, "\n")
    return text


def check_lossless(fast: Tokenizer, texts: Iterable[str]) -> None:
    """Check that texts survive encoding and decoding.

    Raises:
        ValueError: the first text that does not.
    """
    for text in texts:
        decoded = fast.decode(fast.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        if decoded != text.replace(SPACE, " "):
            raise ValueError(f"the tokenizer writes {text[:80]!r} back as {decoded[:80]!r}")


def write_folder(out: Path, model: bytes, fast: Tokenizer, min_pixels: int, max_pixels: int) -> None:
    """Write the files of a processor folder; limits are in pixels x 2 frames."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(model)
    fast.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    shared: dict[str, Any] = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
              "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
              "resample": 3, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
              "processor_class": "Glm4vProcessor"}  # fmt: skip
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    video_size = {"shortest_edge": min_pixels, "longest_edge": max(max_pixels, VIDEO_LIMITS.max_pixels)}
    configs = {
        "preprocessor_config.json": {"image_processor_type": "Glm4vImageProcessor", "size": size, **shared},
        "video_preprocessor_config.json": {"video_processor_type": "Glm4vVideoProcessor", "size": video_size, "fps": 2,
                                           **shared},
        "tokenizer_config.json": tokenizer_config("Glm4vProcessor"),
    }  # fmt: skip
    for name, config in configs.items():
        (out / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glmv-data train-tokenizer`."""
    parser.description = HELP
    parser.add_argument("out", type=Path, metavar="OUT", help="processor folder to write")
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="JSONL", help="files of samples to learn from")
    parser.add_argument("--vocab-size", type=int, default=384, help="pieces, exactly: the model's vocabulary (default 384)")
    parser.add_argument("--min-pixels", type=int, default=IMAGE_LIMITS.min_pixels,
                        help="smallest picture after resizing, pixels x 2 frames (default %(default)s)")  # fmt: skip
    parser.add_argument("--max-pixels", type=int, default=IMAGE_LIMITS.max_pixels,
                        help="largest picture after resizing, pixels x 2 frames (default %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Run the tool and print its report."""
    if not 0 < args.min_pixels <= args.max_pixels:
        raise ValueError("--min-pixels must be positive and not above --max-pixels")
    texts = list(tqdm(read_texts(args.input), desc="read", unit=" texts"))
    model = train_sentencepiece(texts, args.vocab_size)
    fast = build_fast_tokenizer(model)
    sample = [*PROBES, *texts[:: max(1, len(texts) // NUM_COMPARED)]]
    compared = check_equal(model, fast, sample)
    check_lossless(fast, sample)
    write_folder(args.out, model, fast, args.min_pixels, args.max_pixels)
    pieces = sentencepiece_model_pb2.ModelProto.FromString(model).pieces
    learned = sum(piece.type == piece.NORMAL for piece in pieces)
    unused = sum(piece.type == piece.UNUSED for piece in pieces)
    report = {"tool": "train-tokenizer", "vocab_size": len(pieces), "learned": learned, "unused": unused, "texts": len(texts),
              "compared": compared, "image_limits": [args.min_pixels, args.max_pixels]}  # fmt: skip
    print(json.dumps(report))
