"""From files to the tensors of a step: packed by the tool, read by the loader, equal to transformers' whole processor."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from data_tools import cli
from megatron_glmv.config.data import DataConfig, SourceConfig
from megatron_glmv.config.model import ModelConfig
from megatron_glmv.data.loader import RowStream
from megatron_glmv.data.shard_reader import ShardReader
from megatron_glmv.data.videos import read_video_header
from megatron_glmv.model.inputs import make_inputs
from megatron_glmv.sequence.patches import normalize_patches
from tests.data.clips import clip, clips
from tests.data.pictures import draw, encode, rotated_exif
from tests.data.processor import write_processor
from tests.data.test_video_frames import frames_of

MESSAGES = [
    {"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "image", "image": "b.jpg"},
                                 {"type": "text", "text": "Read "}, {"type": "video", "video": "c.webm"}]},
    {"role": "assistant", "content": "<think>4</think>4 0"},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "image", "image": "d.gif"}]},
    {"role": "assistant", "content": "<think>7</think>7"},
]  # fmt: skip
SHOWN = [*MESSAGES[:1], {"role": "assistant", "content": "4 0"}, *MESSAGES[2:]]
"""What the model sees: the first answer without its thinking."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pack_and_load")
    write_processor(root / "processor", min_pixels=2 * 56 * 56, max_pixels=8 * 84 * 112)
    (root / "a.mp4").write_bytes(clip(31, 120, 200))
    (root / "b.jpg").write_bytes(encode(draw(60, 100), "JPEG", exif=rotated_exif(6)))
    (root / "c.webm").write_bytes(clips()["webm-vp9"])
    (root / "d.gif").write_bytes(encode(draw(90, 70), "GIF"))
    (root / "a.jsonl").write_text(json.dumps({"id": "s-1", "messages": MESSAGES}) + "\n")
    arguments = [
        "pack",
        root / "a.jsonl",
        root / "packed",
        "--processor",
        root / "processor",
        "--length",
        "1024",
        "--workers",
        "1",
    ]
    assert cli.main([str(argument) for argument in arguments]) == 0
    return root


def test_a_step_holds_what_transformers_makes_of_the_files(packed: Path, torchvision_shim: ModuleType) -> None:
    from transformers import AutoProcessor
    from transformers.image_utils import load_image
    from transformers.video_utils import VideoMetadata

    processor = AutoProcessor.from_pretrained(packed / "processor")
    files = [(packed / name).read_bytes() for name in ("a.mp4", "c.webm")]
    headers = [read_video_header(data) for data in files]
    theirs = processor(
        text=[processor.apply_chat_template(SHOWN, tokenize=False)],
        images=[load_image(str(packed / name)) for name in ("b.jpg", "d.gif")],
        videos=[frames_of(data) for data in files],
        video_metadata=[VideoMetadata(header.num_frames, header.fps, duration=header.duration_s) for header in headers],
        return_tensors="pt",
    )
    sources = (SourceConfig(name="s", path=packed / "packed"),)
    data = DataConfig(sources=sources, sequence_length=1024, decode_device="cpu")
    stream = RowStream(sources, data, ModelConfig(preset="digits").shape, seed=0, global_batch_rows=1, data_rank=0,
                       data_size=1, decode=True, align=1)  # fmt: skip
    (row,) = stream.step(0).rows
    stream.close()
    tokens = theirs["input_ids"][0]
    assert row.tokens[: len(tokens)].tolist() == tokens.tolist()
    assert row.num_useful == len(tokens) + 1
    grids = [theirs["video_grid_thw"][0], theirs["image_grid_thw"][0], theirs["video_grid_thw"][1], theirs["image_grid_thw"][1]]
    assert row.frames.tolist() == [
        [rows, columns] for count, rows, columns in (grid.tolist() for grid in grids) for _ in range(count)
    ]
    inputs = make_inputs(row, ModelConfig(preset="digits").shape, torch.device("cpu"))
    ours = normalize_patches(inputs.vision.patches[: row.num_patches], torch.float32)
    moving = torch.repeat_interleave(row.moving, row.frames.prod(1))
    assert torch.equal(ours[moving], theirs["pixel_values_videos"])
    assert torch.equal(ours[~moving], theirs["pixel_values"])


def test_only_the_answer_with_its_thinking_is_trained(packed: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(packed / "processor")
    (document,) = ShardReader(packed / "packed").read(0, media=False).documents
    (trained,) = np.split(document.tokens, np.flatnonzero(np.diff(document.loss_weights)) + 1)[1:]
    assert tokenizer.decode(trained) == "<think>7</think>7<|endoftext|>"
