"""A small processor folder, trained on a few sentences by the tool that users call."""

from __future__ import annotations

from pathlib import Path

from data_tools.train_tokenizer import train_sentencepiece, write_folder
from megatron_glmv.data.fast_tokenizer import build_fast_tokenizer

SENTENCES = ["Read the digits.", "How many digits are there?", "What is the sum of the digits?", "Where is the digit 7?",
             "You answer briefly.", "<|begin_of_box|>[[12,345,678,999]]<|end_of_box|>"]  # fmt: skip


def write_processor(folder: Path, min_pixels: int = 12_544, max_pixels: int = 9_633_792) -> Path:
    """Write a processor folder with the vocabulary of the digits preset; limits are in pixels x 2 frames."""
    model = train_sentencepiece(SENTENCES, 384)
    write_folder(folder, model, build_fast_tokenizer(model), min_pixels, max_pixels)
    return folder
