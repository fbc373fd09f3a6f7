"""Small packed data sets with real pictures, written by the tests with the writer that the packer uses."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_glmv.config.model import ModelConfig, ModelShape
from megatron_glmv.data.index import PackedIndex
from megatron_glmv.data.shards import Picture, ShardWriter
from megatron_glmv.sequence.grid import PixelLimits, image_grid
from megatron_glmv.sequence.packed import Document
from tests.data.pictures import draw, encode

SHAPE: ModelShape = ModelConfig(preset="digits").shape
LIMITS = PixelLimits(min_pixels=2 * 56 * 56, max_pixels=2 * 112 * 224)
LENGTH = 128


def measure(data: bytes, extension: str = "png") -> Picture:
    """A picture with the size that Pillow reads."""
    with Image.open(io.BytesIO(data)) as image:
        return Picture(data, extension, image.height, image.width)


def document(key: str, pictures: list[Picture], text: int, seed: int) -> Document:
    """A sample: its pictures between markers, then `text` tokens, of which all but the first are trained."""
    rng = np.random.default_rng(seed)
    ids, frames = SHAPE.tokens, []
    tokens: list[int] = []
    for picture in pictures:
        grid = image_grid(picture.height, picture.width, LIMITS)
        frames.append((grid.rows, grid.columns))
        tokens += [ids.image_start, *[ids.image] * grid.num_tokens(), ids.image_end]
    weights = np.concatenate([np.zeros(len(tokens) + 1), np.ones(text - 1)])
    return Document(np.array([*tokens, *rng.integers(30, 300, text)]), weights, tuple(frames), key)


def default_pictures(row: int, number: int) -> list[Picture]:
    """None, one or two pictures of various sizes; every fourth sample has none, and no sample of every fifth row."""
    if row % 5 == 4 or (row + number) % 4 == 3:
        return []
    seed = 10 * row + number
    height, width = ((56, 56), (60, 100), (56, 112), (90, 40))[seed % 4]
    first = measure(encode(draw(height, width, seed)))
    if number == 1:
        return [first]
    return [first, measure(encode(draw(50, 70, seed + 1), "JPEG"), "jpg")]


def write_rows(
    folder: Path,
    num_rows: int,
    *,
    pictures: Callable[[int, int], list[Picture]] = default_pictures,
    name: str = "s",
    shard_bytes: int = 60_000,
    align: int = 8,
) -> PackedIndex:
    """A data set of `num_rows` rows of two samples; samples are called NAME-row-number."""
    ids = SHAPE.tokens
    writer = ShardWriter(
        folder,
        length=LENGTH,
        align=align,
        vocab_size=SHAPE.text.vocab_size,
        image_token=ids.image,
        pad_token=ids.pad,
        image_limits=LIMITS,
        shard_bytes=shard_bytes,
    )
    for row in range(num_rows):
        own = [pictures(row, number) for number in range(2)]
        documents = [document(f"{name}-{row}-{number}", own[number], 9 + row % 7, 100 * row + number) for number in range(2)]
        writer.write(documents, own)
    return writer.close()
