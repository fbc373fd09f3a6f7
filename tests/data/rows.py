"""Small packed data sets with real pictures and videos, written by the tests with the writer that the packer uses."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_glmv.config.model import ModelConfig, ModelShape
from megatron_glmv.data.index import PackedIndex
from megatron_glmv.data.media import Clip, Picture
from megatron_glmv.data.shard_writer import ShardWriter
from megatron_glmv.data.videos import VideoSettings, plan_video, read_video_header
from megatron_glmv.sequence.grid import PixelLimits, image_grid
from megatron_glmv.sequence.packed import Document
from tests.data.clips import clip
from tests.data.pictures import draw, encode

SHAPE: ModelShape = ModelConfig(preset="digits").shape
LIMITS = PixelLimits(min_pixels=2 * 56 * 56, max_pixels=2 * 112 * 224)
VIDEO = VideoSettings(PixelLimits(min_pixels=2 * 56 * 56, max_pixels=8 * 56 * 56))
LENGTH = 128


def measure(data: bytes, extension: str = "png") -> Picture:
    """A picture with the size that Pillow reads."""
    with Image.open(io.BytesIO(data)) as image:
        return Picture(data, extension, image.height, image.width)


def measure_clip(data: bytes, extension: str = "mp4") -> Clip:
    """A video with the frames that GLM-4.1V takes of it."""
    header = read_video_header(data)
    return Clip(data, extension, header.height, header.width, plan_video(header, VIDEO).frame_indices)


def frames_of(item: Picture | Clip) -> tuple[tuple[int, int], ...]:
    """(rows, columns) in patches of a picture, or of each temporal patch of a video."""
    if isinstance(item, Picture):
        return (image_grid(item.height, item.width, LIMITS).frame,)
    return plan_video(read_video_header(item.data), VIDEO).frames


def document(key: str, media: Sequence[Picture | Clip], text: int, seed: int) -> Document:
    """A sample: its media between markers, then `text` tokens, of which all but the first are trained."""
    rng = np.random.default_rng(seed)
    ids, frames = SHAPE.tokens, []
    tokens: list[int] = []
    for item in media:
        for rows, columns in frames_of(item):
            frames.append((rows, columns))
            tokens += [ids.image_start, *[ids.image] * (rows * columns // 4), ids.image_end]
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


def mixed_media(row: int, number: int) -> list[Picture | Clip]:
    """Pictures as in `default_pictures`, and videos of several formats, alone, before and after pictures."""
    pictures = default_pictures(row, number)
    if number or row % 3 == 2:
        return [*pictures]
    codec, form, name = (("libx264", "mp4", "mp4"), ("libvpx-vp9", "webm", "webm"), ("libx264", "matroska", "mkv"))[
        row // 2 % 3
    ]
    video = measure_clip(clip(11 + row % 4, 56, 56, fps=6, codec=codec, form=form, seed=row), name)
    return [video, *pictures[:1]] if row % 2 else [*pictures[:1], video]


def write_rows(
    folder: Path,
    num_rows: int,
    *,
    pictures: Callable[[int, int], Sequence[Picture | Clip]] = default_pictures,
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
