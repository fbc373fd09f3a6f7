"""The evaluation makes of a clip without torchvision what all of transformers' processor makes of it with torchvision."""

from __future__ import annotations

import io
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
import torch

from examples import quickstart_evaluate as evaluation
from tests.data.clips import clip
from tests.examples.samples import read_eval


@pytest.fixture(scope="module")
def questions(data: Path, hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[evaluation.Question]:
    """Every held-out clip, and two whose frames are resized, one of an odd number of sampled frames.

    Prepared before torchvision can be imported.
    """
    answerer = evaluation.Answerer(hf_folder)
    folder = tmp_path_factory.mktemp("clips")
    samples = [sample for sample in read_eval(data) if sample["task"] == "watch"]
    found = [answerer.prepare(sample, data / "raw") for sample in samples]
    for name, number in (("even.mp4", 31), ("odd.mp4", 25)):
        (folder / name).write_bytes(clip(number))
        content = [{"type": "video", "video": name}, {"type": "text", "text": "Which digits appear, in order?"}]
        found.append(answerer.prepare({"id": name, "messages": [{"role": "user", "content": content}]}, folder))
    return found


@pytest.fixture(scope="module")
def processor(questions: list[evaluation.Question], hf_folder: Path, torchvision_shim: ModuleType) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(hf_folder)


def _processed(processor: Any, question: evaluation.Question) -> Any:
    from transformers.video_utils import VideoMetadata

    messages = [message for message in question.sample["messages"] if message["role"] == "user"]
    with av.open(io.BytesIO(question.path.read_bytes())) as container:
        rate = float(container.streams.video[0].average_rate)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    metadata = VideoMetadata(len(frames), rate, duration=len(frames) / rate)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return processor(text=[text], videos=[frames], video_metadata=[metadata], return_tensors="pt")


def test_tokens_grids_and_kinds_of_tokens_are_equal(questions: list[evaluation.Question], processor: Any) -> None:
    for question in questions:
        batch = _processed(processor, question)
        assert question.kind == "video"
        assert question.ids == batch["input_ids"][0].tolist()
        assert question.grid.tolist() == batch["video_grid_thw"].tolist()
        image_id = processor.tokenizer.convert_tokens_to_ids(evaluation.IMAGE_TOKEN)
        kinds = (torch.tensor(question.ids) == image_id) * evaluation.TOKEN_TYPES["video"]
        assert kinds.tolist() == batch["mm_token_type_ids"][0].tolist()
    assert {int(question.grid[0, 0]) for question in questions} >= {1, 2, 3, 4}
    assert [question.grid[0].tolist() for question in questions[-2:]] == [[3, 4, 8], [3, 4, 8]]


def test_patches_are_equal(questions: list[evaluation.Question], processor: Any) -> None:
    """Resized frames too; what is left is the order of dividing and subtracting in float32."""
    for question in questions:
        error = (question.patches - _processed(processor, question)["pixel_values_videos"]).abs()
        assert error.max() < 1e-5
