"""Videos to patches: the pixels of transformers' video processor to the bit, and the right frames however the file is made."""

from __future__ import annotations

import io
from functools import cache

import av
import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import pytest
import torch
from nvidia.dali.experimental.dynamic import _ops

from megatron_glmv.data import video_frames
from megatron_glmv.data.media import BadMedia
from megatron_glmv.data.video_frames import EncodedVideo, VideoDecoder, dali_frames
from megatron_glmv.data.videos import DynamicRate, VideoPlan, VideoSettings, plan_video, read_video_header
from megatron_glmv.sequence.grid import PixelLimits
from megatron_glmv.sequence.patches import cut_patches, join_frames, normalize_patches
from tests.data.clips import broken_clips, clip, clips

LIMITS = PixelLimits(12_544, 8 * 120 * 160)
FAMILIES = {"Glm4v": VideoSettings(LIMITS), "Glm46V": VideoSettings(LIMITS, DynamicRate(), "tenths")}


@pytest.fixture(scope="module")
def decoder():
    opened = VideoDecoder(num_threads=2)
    yield opened
    opened.close()


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request, torchvision_shim):
    import transformers

    size = {"shortest_edge": LIMITS.min_pixels, "longest_edge": LIMITS.max_pixels}
    return getattr(transformers, request.param + "VideoProcessor")(size=size)


@cache
def frames_of(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def planned(data: bytes, settings: VideoSettings = FAMILIES["Glm4v"]) -> tuple[VideoPlan, EncodedVideo]:
    header = read_video_header(data)
    plan = plan_video(header, settings)
    return plan, EncodedVideo(data, (plan.height, plan.width), (header.height, header.width), plan.frame_indices)


def whole(video: EncodedVideo) -> EncodedVideo:
    """The video in the size that it has, which needs no resize."""
    return EncodedVideo(video.data, video.size, video.size, video.frame_indices)


@pytest.mark.parametrize("kind", clips())
def test_every_kind_equals_the_video_processor(decoder, processor, kind):
    from transformers.video_utils import VideoMetadata

    data = clips()[kind]
    header = read_video_header(data)
    metadata = VideoMetadata(header.num_frames, header.fps, duration=header.duration_s)
    theirs = processor(videos=[frames_of(data)], video_metadata=[metadata], return_tensors="pt")
    plan, video = planned(data, FAMILIES[type(processor).__name__.removesuffix("VideoProcessor")])
    patches = join_frames(decoder.decode(video), torch.tensor(plan.frames), torch.ones(plan.grid.frames, dtype=torch.bool))
    assert theirs["video_grid_thw"].tolist() == [[plan.grid.frames, plan.grid.rows, plan.grid.columns]]
    assert torch.equal(normalize_patches(patches, torch.float32), theirs["pixel_values_videos"])


LONG = {
    "closed": clip(240, 56, 84, fps=30, keyframe_every=50),
    "open": clip(240, 56, 84, fps=30, keyframe_every=50, options=(("x264-params", "open-gop=1:bframes=3:scenecut=0"),)),
    "all key": clip(60, 56, 84, fps=30, keyframe_every=1),
    "one key": clip(240, 56, 84, fps=30, keyframe_every=1_000),
    "matroska": clip(240, 56, 84, fps=30, keyframe_every=50, form="matroska"),
    "transport": clip(240, 56, 84, fps=30, keyframe_every=50, form="mpegts"),
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("indices", [(0, 1), (3, 49, 50, 51), (59, 59), (7, 52, 55, 58)], ids=str)
def test_the_chosen_frames_are_found_wherever_decoding_starts(decoder, kind, indices):
    data = LONG[kind]
    if kind != "all key":
        indices = (*indices, 149, 150, 239, 239)
    expected = torch.cat([cut_patches(torch.from_numpy(frames_of(data)[index])) for index in indices])
    assert torch.equal(decoder.decode(EncodedVideo(data, (56, 84), (56, 84), indices)), expected)


def test_only_what_is_needed_is_decoded(decoder, monkeypatch):
    """Of 240 frames with a key every 50, four wanted ones cost the way from their keys."""
    seen = []
    checked = video_frames._checked
    monkeypatch.setattr(video_frames, "_checked", lambda frame, video: seen.append(frame.time) or checked(frame, video))
    counted = []
    monkeypatch.setattr(video_frames, "_count_up", lambda *args: counted.append(args) or iter(()))
    decoder.decode(EncodedVideo(LONG["closed"], (56, 84), (56, 84), (10, 60, 120, 239)))
    assert [round(time * 30) for time in seen] == [10, 60, 120, 239]
    assert not counted


def test_files_without_trustworthy_times_are_counted_through(decoder):
    """AVI has no times of display: with B-frames, the times that FFmpeg makes up are not even ascending."""
    data = clip(40, 56, 84, fps=10, form="avi", options=(("bf", "2"),))
    expected = torch.cat([cut_patches(torch.from_numpy(frames_of(data)[index])) for index in (3, 20, 21, 30)])
    assert torch.equal(decoder.decode(EncodedVideo(data, (56, 84), (56, 84), (3, 20, 21, 30))), expected)


@pytest.mark.parametrize("kind", broken_clips())
def test_a_broken_video_is_named(decoder, kind):
    bad = decoder.decode(EncodedVideo(broken_clips()[kind], (56, 84), (60, 100), (0, 5, 10, 15)))
    assert isinstance(bad, BadMedia)
    assert bad.reason
    assert "\n" not in bad.reason
    assert isinstance(decoder.decode(planned(clip())[1]), torch.Tensor)


def test_what_was_measured_must_hold(decoder):
    data = clip()
    bad = decoder.decode(EncodedVideo(data, (56, 84), (100, 60), (0, 1)))
    assert bad == BadMedia("decodes to 60 x 100 pixels, 100 x 60 were measured")
    bad = decoder.decode(EncodedVideo(data, (56, 84), (60, 100), (30, 31)))
    assert bad == BadMedia("frame 31 was planned, the video has 31")


def test_threads_change_nothing(decoder):
    one = VideoDecoder(num_threads=1)
    try:
        for data in (*clips().values(), *LONG.values()):
            video = planned(data)[1]
            assert torch.equal(one.decode(video), decoder.decode(video))
    finally:
        one.close()


def test_frames_of_full_size_do_not_pile_up(decoder, monkeypatch):
    """However many frames are taken, few of full size wait for their resize."""
    data = clip(120, 240, 320, fps=2, keyframe_every=30)
    _, video = planned(data)
    assert len(video.frame_indices) == 120
    alive, most = set(), []
    read = video_frames._read_frames

    def watched(*args):
        for index, frame in read(*args):
            alive.add(index)
            most.append(len(alive))
            yield index, frame

    resize = VideoDecoder._resize
    done = iter(video.frame_indices)
    monkeypatch.setattr(video_frames, "_read_frames", watched)
    monkeypatch.setattr(VideoDecoder, "_resize", lambda self, *args: (alive.discard(next(done)), resize(self, *args))[1])
    assert isinstance(decoder.decode(video), torch.Tensor)
    assert max(most) <= 2 * 2 + 2


def test_the_way_over_dali_takes_the_same_frames(decoder, monkeypatch):
    """What a GPU runs, here on DALI's CPU backend, which knows VP9; its chroma is upsampled otherwise, its resize is float."""
    data = clips()["webm-vp9"]
    plan, video = planned(data)
    monkeypatch.setattr(video_frames, "GPU_BYTES", 3 * 3 * 60 * 100)
    ours = torch.cat(list(dali_frames(video, "cpu", 14, 2))).int()
    theirs = decoder.decode(video).int()
    assert ours.shape == theirs.shape
    per_frame = plan.grid.rows * plan.grid.columns
    distances = torch.stack([(a - b).abs().float().mean() for a in ours.split(per_frame) for b in theirs.split(per_frame)])
    distances = distances.view(len(video.frame_indices), -1)
    for row, place in enumerate(video.frame_indices):
        nearest = video.frame_indices[int(distances[row].argmin())]
        assert nearest == place
    assert distances.diagonal().max() < 4


@pytest.fixture
def by_dali():
    """A decoder that goes the way of a GPU, on DALI's CPU backend."""
    opened = VideoDecoder(by_dali=True)
    yield opened
    opened.close()


def test_dali_keeps_its_operators_from_video_to_video(by_dali, alive):
    """Two, one that decodes and one that resizes, whatever the videos' sizes and numbers of frames."""
    before = alive(_ops.Operator)
    vp9 = clips()["webm-vp9"]
    for last in range(1, 11):
        resized = (28 * (1 + last % 3), 84)
        assert isinstance(by_dali.decode(EncodedVideo(vp9, resized, (60, 100), tuple(range(last)))), torch.Tensor)
    assert alive(_ops.Operator) - before == 2


def test_dalis_frames_are_freed_with_their_video(by_dali, alive, monkeypatch):
    """Also where they are decoded in several pieces, with and without a resize, or are of another size than measured."""
    monkeypatch.setattr(video_frames, "GPU_BYTES", 2 * 3 * 60 * 100)
    video = planned(clips()["webm-vp9"])[1]
    before = alive(ndd.Batch)
    same = clip(9, 56, 84, codec="libvpx-vp9", form="webm")
    for kind in (video, whole(planned(same)[1])):
        assert isinstance(by_dali.decode(kind), torch.Tensor)
    wrong = by_dali.decode(EncodedVideo(video.data, video.resized, (100, 60), video.frame_indices))
    assert wrong == BadMedia("decodes to 60 x 100 pixels, 100 x 60 were measured")
    assert alive(ndd.Batch) == before


REFUSED = clip(9, codec="ffv1", form="matroska")
"""A video that DALI decodes on no device."""


def test_what_dali_refuses_is_decoded_on_the_cpu(by_dali, decoder, capsys):
    """Its CPU backend does not know MPEG-4, as NVDEC does not know other codecs. Only the first such video gets a line."""
    for data, is_refused in ((clips()["mp4-mpeg4"], True), (REFUSED, True), (clips()["webm-vp9"], False)):
        video = planned(data)[1]
        into = torch.zeros_like(decoder.decode(video))
        assert by_dali.decode(video, into) is into
        assert torch.equal(into, decoder.decode(video)) == is_refused
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("glmv: warning: DALI refuses a video that the CPU decodes (")
    assert line.endswith("); such videos are decoded on the CPU")


@pytest.mark.parametrize("kind", broken_clips())
def test_what_nobody_decodes_is_named_as_on_the_cpu(by_dali, decoder, kind, capsys):
    video = EncodedVideo(broken_clips()[kind], (56, 84), (60, 100), (0, 5, 10, 15))
    assert by_dali.decode(video) == decoder.decode(video)
    assert not capsys.readouterr().err


@pytest.mark.gpu
def test_a_gpu_agrees(decoder):
    gpu = VideoDecoder("gpu")
    for kind in ("mp4-h264", "webm-vp9", "mp4-h265"):
        video = planned(clips()[kind])[1]
        difference = (gpu.decode(video).cpu().int() - decoder.decode(video).int()).abs()
        assert difference.float().mean() < 4
    refused = planned(REFUSED)[1]
    assert torch.equal(gpu.decode(refused).cpu(), decoder.decode(refused))
    assert isinstance(gpu.decode(EncodedVideo(b"no video", (56, 84), (60, 100), (0, 1))), BadMedia)
