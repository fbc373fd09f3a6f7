"""Planning a video: frames, seconds, size, grid and tokens as transformers' processors of both generations have them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest

from megatron_glmv.data.chat import Chat, ProcessorError, read_video_settings
from megatron_glmv.data.sample import Sample, SampleError, parse_sample
from megatron_glmv.data.videos import (
    DynamicRate,
    FixedRate,
    VideoError,
    VideoHeader,
    VideoSettings,
    plan_video,
    read_video_header,
    sample_frames,
    write_seconds,
)
from megatron_glmv.sequence.grid import PixelLimits, image_grid
from megatron_glmv.sequence.positions import multimodal_positions
from tests.data.clips import broken_clips, clip, clips
from tests.data.pictures import encode
from tests.data.processor import write_processor

FAMILIES = {"Glm4v": VideoSettings(), "Glm46V": VideoSettings(sampling=DynamicRate(), seconds="tenths")}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "Read "},
                                 {"type": "image", "image": "b.png"}, {"type": "video", "video": "c.webm"}]},
    {"role": "assistant", "content": "4 0"},
]  # fmt: skip


def make_sample(messages: list[dict[str, Any]]) -> Sample:
    return parse_sample(json.dumps({"id": "s-1", "messages": messages}), "file:1", Path())


def change_family(folder: Path, family: str) -> Path:
    """A copy of a processor folder in the classes of another generation."""
    for path in sorted(folder.glob("*.json")):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("Glm4vVideo", family + "Video").replace("Glm4vProcessor", family + "Processor"))
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return change_family(write_processor(tmp_path_factory.mktemp(family) / "processor"), family)


@pytest.fixture(scope="module")
def processor(folder: Path, torchvision_shim: ModuleType) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def decoded(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("fps", [1, 2, 7.5, 10, 23.976, 24, 25, 30000 / 1001, 30, 59.94, 120])
@pytest.mark.parametrize("seconds", [0.05, 0.2, 0.5, 1, 1.6, 9.99, 29.9, 30, 30.2, 61, 299.7, 300, 300.4, 301, 640, 2399, 3000])
def test_the_same_frames_are_taken(family: str, processor: Any, fps: float, seconds: float) -> None:
    from transformers.video_utils import VideoMetadata

    header = VideoHeader(max(1, round(seconds * fps)), fps, 60, 100)
    theirs = processor.video_processor.sample_frames(VideoMetadata(header.num_frames, fps, duration=header.duration_s))
    ours = sample_frames(header, FAMILIES[family].sampling)
    assert list(ours) == theirs.tolist()
    assert len(ours) % 2 == 0


def test_long_videos_stay_within_the_family_limits() -> None:
    frames = {seconds: [len(sample_frames(VideoHeader(30 * seconds, 30, 9, 9), settings.sampling))
                        for settings in FAMILIES.values()] for seconds in (10, 300, 301, 3000)}  # fmt: skip
    assert frames == {10: [20, 60], 300: [600, 600], 301: [600, 302], 3000: [600, 640]}


@pytest.mark.parametrize("kind", clips())
def test_the_header_is_known_without_decoding(kind: str) -> None:
    header = read_video_header(clips()[kind])
    assert (header.num_frames, header.height, header.width) == decoded(clips()[kind]).shape[:3]
    with av.open(io.BytesIO(clips()[kind])) as container:
        assert header.fps == float(container.streams.video[0].average_rate)


@pytest.mark.parametrize("kind", broken_clips())
def test_a_broken_video_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(broken_clips()[kind])
    for source in (broken_clips()[kind], tmp_path / "a.mp4"):
        with pytest.raises(VideoError, match=r"not a video|cut off|no frames"):
            read_video_header(source)


def test_a_playlist_or_a_picture_is_no_video(tmp_path: Path) -> None:
    """A playlist would make FFmpeg open what it names."""
    (tmp_path / "a.mp4").write_bytes(clip())
    lists = [f"#EXTM3U\n#EXTINF:3,\n{tmp_path / 'a.mp4'}\n", f"ffconcat version 1.0\nfile '{tmp_path / 'a.mp4'}'\n"]
    for data in (*(text.encode() for text in lists), encode(np.zeros((20, 20, 3), np.uint8), "JPEG")):
        with pytest.raises(VideoError):
            read_video_header(data)


@pytest.mark.parametrize("kind", clips())
def test_the_processor_gives_the_same_tokens_and_grids(family: str, folder: Path, processor: Any, kind: str) -> None:
    """A user's turn with a video, a picture and another video, through the whole of AutoProcessor."""
    from transformers.video_utils import VideoMetadata

    files = [clips()[kind], clips()["webm-vp9"]]
    headers = [read_video_header(data) for data in files]
    metadata = [VideoMetadata(header.num_frames, header.fps, duration=header.duration_s) for header in headers]
    chat = Chat(folder)
    assert chat.video == FAMILIES[family]
    batch = processor(
        text=[processor.apply_chat_template(TURNS, tokenize=False)], images=[np.zeros((45, 30, 3), np.uint8)],
        videos=[decoded(data) for data in files], video_metadata=metadata, return_tensors="np",
    )  # fmt: skip
    plans = [plan_video(header, chat.video) for header in headers]
    document = chat.encode(make_sample(TURNS), [plans[0], image_grid(45, 30, chat.image.limits), plans[1]])
    assert [[plan.grid.frames, plan.grid.rows, plan.grid.columns] for plan in plans] == batch["video_grid_thw"].tolist()
    assert document.tokens[:-1].tolist() == batch["input_ids"][0].tolist()
    assert document.frames == (*plans[0].frames, image_grid(45, 30, chat.image.limits).frame, *plans[1].frames)
    multimodal_positions(document.tokens == chat.image_token, document.frames)


def test_the_text_of_a_video(folder: Path, family: str) -> None:
    chat = Chat(folder)
    plan = plan_video(VideoHeader(31, 10, 28, 28), chat.video)
    document = chat.encode(make_sample([{"role": "user", "content": [TURNS[0]["content"][0]]}, TURNS[1]]), [plan])
    text = chat.tokenizer.decode(document.tokens).replace("<|image|>", "")
    frame = "<|begin_of_image|><|end_of_image|>"
    tenths = "0.0 seconds", "0.3 seconds", "0.7 seconds", "1.0 seconds"
    times = ("0", "1", "2<|end_of_video|>") if family == "Glm4v" else tenths
    assert text.startswith("[gMASK]<sop><|user|>\n<|begin_of_video|>" + "".join(frame + time for time in times))
    assert text.endswith("<|end_of_video|><|assistant|>\n4 0<|endoftext|>")


def test_seconds_are_written_as_the_processor_writes_them(family: str, processor: Any) -> None:
    for seconds in (0.0, 0.04, 0.05, 0.25, 0.35, 0.999, 1.0, 1.5, 2.96, 59.95, 61.07, 299.999, 3599.5):
        theirs = processor.replace_frame_token_id(seconds, num_image_tokens=0).rpartition("<|end_of_image|>")[2]
        assert write_seconds(seconds, FAMILIES[family].seconds) == theirs


def test_videos_that_do_not_match_the_sample_are_refused(folder: Path) -> None:
    plan = plan_video(VideoHeader(31, 10, 60, 100), VideoSettings())
    with pytest.raises(SampleError, match=r"'s-1'.*2 placeholders for 1 videos"):
        Chat(folder).encode(make_sample(TURNS), [plan, image_grid(45, 30, PixelLimits())])


def test_a_plan_that_cannot_be_resized_is_refused() -> None:
    with pytest.raises(ValueError, match="aspect ratio"):
        plan_video(VideoHeader(31, 10, 28, 28 * 201), VideoSettings())


def test_settings_come_from_the_folder(tmp_path: Path, processor: Any, folder: Path, family: str) -> None:
    processor.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "video_preprocessor_config.json").exists()
    assert read_video_settings(tmp_path / "saved") == read_video_settings(folder) == FAMILIES[family]
    other = write_processor(tmp_path / "other", min_pixels=1568)
    path = other / "video_preprocessor_config.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"fps": 1, "max_duration": 60, "size": {"shortest_edge": 99, "longest_edge": 999}}))
    assert read_video_settings(other) == VideoSettings(PixelLimits(99, 999), FixedRate(1.0, 60.0))
    path.unlink()
    assert read_video_settings(other).limits == PixelLimits(1568, 9_633_792)
    path.write_text(json.dumps(tree | {"video_processor_type": "Qwen2VLVideoProcessor"}))
    with pytest.raises(ProcessorError, match="Qwen2VLVideoProcessor"):
        read_video_settings(other)
