"""From a video's header to the frames that are decoded, their size, their grid and the seconds written behind them.

Everything that decides how many tokens a video takes is known without decoding: its packets are counted, not decompressed. So
a data set is packed from headers, and the loader decodes the very frames that were planned.

Source: transformers 5.23.0, models/glm4v/video_processing_glm4v.py and models/glm46v/video_processing_glm46v.py
(`sample_frames`, `resize`), models/*/processing_*.py (`replace_video_token`, `replace_frame_token_id`) and video_utils.py
(`read_video_pyav`: the duration is the number of frames over the average rate; `VideoMetadata.timestamps`).
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from megatron_glmv.sequence.grid import VIDEO_LIMITS, Grid, PixelLimits, smart_resize

TEMPORAL = 2
"""Frames that one temporal patch covers."""
MAX_FRAME_PIXELS = 8192 * 4352
"""A video that claims larger frames is not decoded; 8K is 7680 x 4320."""
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
"""Formats of files that FFmpeg may take the bytes for: no playlist, which would name other files, and no single picture."""
MISSING_SHARE = 0.01
"""A file that lacks more than this share of the frames that its header lists was cut off."""


class VideoError(ValueError):
    """A video that cannot be read; the message says why, and not which."""


@dataclass(frozen=True)
class VideoHeader:
    """What is known of a video before a frame is decoded; height and width as coded, a rotation of the display not applied."""

    num_frames: int
    fps: float
    height: int
    width: int

    @property
    def duration_s(self) -> float:
        """Seconds, as the frames at the average rate take."""
        return self.num_frames / self.fps


@dataclass(frozen=True)
class FixedRate:
    """GLM-4.1V's sampling: `fps` frames a second; of a video longer than max_duration_s as many as of one that long, spread."""

    fps: float = 2.0
    max_duration_s: float = 300.0


@dataclass(frozen=True)
class DynamicRate:
    """GLM-4.6V's sampling: the shorter the video, the more frames a second.

    Attributes:
        tiers: (seconds, temporal patches a second): the first tier that is long enough holds, the last for all longer videos.
        max_duration_s: seconds that count towards the number of frames.
        max_frames: of any video.
    """

    tiers: tuple[tuple[float, float], ...] = ((30.0, 3.0), (300.0, 1.0), (2400.0, 0.5))
    max_duration_s: float = 2400.0
    max_frames: int = 640


Sampling = FixedRate | DynamicRate


@dataclass(frozen=True)
class VideoSettings:
    """How a processor folder treats videos.

    Attributes:
        limits: bounds on frames x height x width after resizing.
        sampling: which frames are taken.
        seconds: how the time of a temporal patch is written: whole seconds (4.1V) or "0.5 seconds" (4.6V).
        patch_size: side of a patch in pixels.
        merge_size: patches a side of one token.
    """

    limits: PixelLimits = VIDEO_LIMITS
    sampling: Sampling = field(default_factory=FixedRate)
    seconds: Literal["whole", "tenths"] = "whole"
    patch_size: int = 14
    merge_size: int = 2


@dataclass(frozen=True)
class VideoPlan:
    """What of a video enters a row.

    Attributes:
        frame_indices: of the frames in the order of display, from 0; their number is even, the last may stand twice.
        seconds: time of each temporal patch, that of its first frame.
        grid: temporal patches x rows x columns.
        height: pixels after resizing.
        width: pixels after resizing.
    """

    frame_indices: tuple[int, ...]
    seconds: tuple[float, ...]
    grid: Grid
    height: int
    width: int

    @property
    def frames(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) in patches of each temporal patch, as `Document.frames` lists them."""
        return (self.grid.frame,) * self.grid.frames


def sample_frames(header: VideoHeader, sampling: Sampling) -> tuple[int, ...]:
    """Which frames are taken: ascending indices, an even number of them, the last repeated where their number is odd."""
    chosen = _fixed(header, sampling) if isinstance(sampling, FixedRate) else _dynamic(header, sampling)
    unique = list(dict.fromkeys(chosen))
    return tuple(unique + unique[-1:] * (len(unique) % 2))


def plan_video(header: VideoHeader, settings: VideoSettings) -> VideoPlan:
    """The frames, times, size and grid of a video.

    Raises:
        ValueError: an aspect ratio over 200.
    """
    indices = sample_frames(header, settings.sampling)
    factor = settings.patch_size * settings.merge_size
    height, width = smart_resize(len(indices), header.height, header.width, settings.limits, factor, TEMPORAL)
    grid = Grid(len(indices) // TEMPORAL, height // settings.patch_size, width // settings.patch_size)
    seconds = tuple(index / header.fps for index in indices[::TEMPORAL])
    return VideoPlan(indices, seconds, grid, height, width)


def write_seconds(seconds: float, form: Literal["whole", "tenths"]) -> str:
    """The time of a temporal patch as it stands in the text behind the patch."""
    return str(int(seconds)) if form == "whole" else f"{seconds:.1f} seconds"


def read_video_header(source: Path | bytes) -> VideoHeader:
    """A video's size, rate and number of frames; reads every packet and decodes none.

    Args:
        source: a file, or its contents. The format is found from the contents, whatever the file is called.

    Raises:
        VideoError: no video that can be read, one without frames, one that was cut off, or frames over MAX_FRAME_PIXELS.
        OSError: the file cannot be opened.
    """
    with open_video(source) as (container, stream):
        shown, times = _count(container, stream)
        return VideoHeader(shown, _rate(stream, times), stream.height, stream.width)


@contextmanager
def open_video(source: Path | bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video's container and its first video stream; FFmpeg's errors, inside the block too, become VideoError.

    Raises:
        VideoError: as `read_video_header`.
        OSError: the file cannot be opened.
    """
    if isinstance(source, Path):
        source.open("rb").close()
    file = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source.absolute()}"
    try:
        with av.open(file, "r", options={"format_whitelist": CONTAINERS}) as container:
            if not container.streams.video:
                raise VideoError("no video stream")
            stream = container.streams.video[0]
            if stream.height * stream.width > MAX_FRAME_PIXELS:
                raise VideoError(f"frames of {stream.height} x {stream.width} pixels are over {MAX_FRAME_PIXELS}")
            if not stream.height or not stream.width:
                raise VideoError("frames without a size")
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(f"not a video that can be read ({error.strerror})") from None


def _count(container: InputContainer, stream: VideoStream) -> tuple[int, list[int]]:
    """Frames that are shown, and their times in units of the stream; frames before the start of an edited file are not."""
    shown, listed, times = 0, 0, []
    for packet in container.demux(stream):
        if not packet.size:
            continue
        listed += 1
        if not packet.is_discard:
            shown += 1
            times += [packet.pts] if packet.pts is not None else []
    if stream.frames * (1 - MISSING_SHARE) > listed:
        raise VideoError(f"cut off: {listed} of {stream.frames} frames are there")
    if not shown:
        raise VideoError("no frames")
    return shown, times


def _rate(stream: VideoStream, times: Sequence[int]) -> float:
    if stream.average_rate:
        return float(stream.average_rate)
    span = float((max(times) - min(times)) * stream.time_base) if times and stream.time_base else 0.0
    if span <= 0:
        raise VideoError("no frame rate, and no times to find it from")
    return (len(times) - 1) / span


def _fixed(header: VideoHeader, sampling: FixedRate) -> list[int]:
    last, duration = header.num_frames - 1, header.duration_s
    if duration <= sampling.max_duration_s:
        wanted = max(math.floor(duration * sampling.fps), 1)
        return [min(last, math.ceil(number * header.fps / sampling.fps)) for number in range(wanted)]
    wanted = int(sampling.max_duration_s * sampling.fps)
    if wanted >= header.num_frames:
        return list(range(header.num_frames))
    times = np.linspace(0, duration, wanted, endpoint=True)
    return [min(last, math.ceil(time * header.fps)) for time in times]


def _dynamic(header: VideoHeader, sampling: DynamicRate) -> list[int]:
    duration = min(header.duration_s, sampling.max_duration_s)
    rate = TEMPORAL * next((rate for seconds, rate in sampling.tiers if duration <= seconds), sampling.tiers[-1][1])
    wanted = min(int(duration * rate), sampling.max_frames)
    if header.num_frames < wanted:
        return _spread(0, header.num_frames - 1, wanted)
    chosen: list[int] = []
    due, frame_s, step_s = 0.0, 1 / header.fps, 1 / rate
    for index in range(header.num_frames):
        if index * frame_s >= due:
            due += step_s
            chosen.append(index)
            if due >= int(header.duration_s):
                break
    if len(chosen) < wanted:
        return _spread(chosen[0], chosen[-1], wanted)
    return _spread(0, header.num_frames - 1, wanted) if len(chosen) > wanted else chosen


def _spread(first: int, last: int, number: int) -> list[int]:
    return np.linspace(first, last, number, dtype=int).tolist()
