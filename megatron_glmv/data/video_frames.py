"""Videos from compressed bytes to patches: only the planned frames are decoded and kept, one bad video harms no other.

On the CPU PyAV (FFmpeg) decodes, because DALI's CPU build knows neither H.264 nor H.265. Decoding jumps to the last key frame
before each wanted frame, every frame is resized as soon as it is there, by the kernel that resizes pictures, and only a few
frames of full size exist at a time, however long the video is. On a GPU DALI decodes (NVDEC) and resizes, some frames at a
time; what it refuses, such as a codec that NVDEC does not know, goes the way of the CPU. The GPU way has not run on hardware;
its calls run in the tests on the CPU, with codecs that DALI decodes there and that it refuses.

The pixels are those of transformers' `read_video_pyav`: FFmpeg's conversion to RGB, a rotation of the display not applied.

Source: transformers 5.23.0, video_utils.py (`read_video_pyav`); PyAV 18.1.0; nvidia-dali 2.4.0, `ndd.decoders.video`.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch
from av import VideoFrame
from av.container import InputContainer
from av.video.stream import VideoStream
from nvidia.dali import types
from torch import Tensor

from megatron_glmv.data.media import BadMedia
from megatron_glmv.data.resize import resize
from megatron_glmv.data.videos import VideoError, open_video
from megatron_glmv.sequence.patches import cut_patches

GPU_BYTES = 256 << 20
"""Bytes of decoded frames of full size that the GPU holds at a time."""


@dataclass(frozen=True)
class EncodedVideo:
    """A video to decode.

    Attributes:
        data: the file's bytes.
        resized: (height, width) in pixels to resize to, multiples of patch x merge.
        size: (height, width) of its frames as measured.
        frame_indices: frames to take, ascending, from 0 in the order of display; the last may stand twice.
    """

    data: bytes
    resized: tuple[int, int]
    size: tuple[int, int]
    frame_indices: tuple[int, ...]


class VideoDecoder:
    """Decodes, resizes and cuts videos into patches. Not for two threads at once."""

    def __init__(
        self,
        device: Literal["cpu", "gpu"] = "cpu",
        num_threads: int = 1,
        *,
        patch: int = 14,
        merge: int = 2,
        stream: torch.cuda.Stream | None = None,
        by_dali: bool | None = None,
    ) -> None:
        """Prepare DALI where it decodes, and the resizing threads.

        Args:
            device: where frames are decoded and resized; the patches stay there. "gpu" is torch's current CUDA device.
            num_threads: threads of the decoder and of the resize.
            patch: side of a patch in pixels.
            merge: patches a side of one token.
            stream: on a GPU the one to work on; None makes one.
            by_dali: let DALI decode, which knows few codecs on the CPU; None: on a GPU.
        """
        self._num_threads, self._patch, self._merge = num_threads, patch, merge
        self._gpu = torch.device("cuda", torch.cuda.current_device()) if device == "gpu" else None
        self._stream = (stream or torch.cuda.Stream(self._gpu)) if self._gpu else None
        self._warned = False
        self._context = None
        if by_dali or (by_dali is None and self._gpu):
            # Once, because DALI's operators and the context that keeps them refer to each other: only the garbage collector
            # would free those of each video.
            self._context = ndd.EvalContext(
                num_threads=num_threads, device_id=self._gpu.index if self._gpu else None, cuda_stream=self._stream
            )
        self._pool = ThreadPoolExecutor(num_threads, "frames")

    def decode(self, video: EncodedVideo, into: Tensor | None = None) -> Tensor | BadMedia:
        """The patches of a video's frames, or why there are none.

        Args:
            video: to decode.
            into: the tensor to fill, on the decoder's device; None makes a new one.

        Returns:
            [frames x rows x columns, patch x patch x 3] uint8, frame by frame as `sequence.patches.cut_patches` makes them.
        """
        height, width = video.resized
        if into is None:
            size = (len(video.frame_indices) * height * width // self._patch**2, 3 * self._patch**2)
            into = torch.empty(size, dtype=torch.uint8, device=self._gpu)
        try:
            if self._context is None:
                self._decode_cpu(video, into)
            else:
                self._decode_dali(video, into, self._context)
            return into
        except VideoError as error:
            return BadMedia(str(error))
        except RuntimeError as error:
            return BadMedia(f"does not decode ({_line(error)})")

    def close(self) -> None:
        """End the resizing threads."""
        self._pool.shutdown()

    def _decode_cpu(self, video: EncodedVideo, into: Tensor) -> None:
        slots = into.view(len(video.frame_indices), -1, into.shape[1])
        places: dict[int, list[int]] = {}
        for place, index in enumerate(video.frame_indices):
            places.setdefault(index, []).append(place)

        def finish(frame: VideoFrame, index: int) -> None:
            pixels = self._resize(frame, video.resized)
            for place in places[index]:
                cut_patches(pixels, self._patch, self._merge, slots[place])

        waiting: deque[Future[None]] = deque()
        try:
            for index, frame in _read_frames(video, self._num_threads):
                if len(waiting) > self._num_threads:
                    waiting.popleft().result()
                waiting.append(self._pool.submit(finish, frame, index))
        finally:
            for future in waiting:
                future.exception()
        for future in waiting:
            future.result()

    def _resize(self, frame: VideoFrame, size: tuple[int, int]) -> Tensor:
        return resize(torch.from_numpy(frame.to_ndarray(format="rgb24")), size)

    def _decode_dali(self, video: EncodedVideo, into: Tensor, context: ndd.EvalContext) -> None:
        """By DALI, and what that refuses on the CPU."""
        try:
            slots = into.chunk(len(video.frame_indices))
            with context, torch.cuda.stream(self._stream):
                pieces = dali_frames(video, "gpu" if self._gpu else "cpu", self._patch, self._merge)
                for slot, patches in zip(slots, pieces, strict=True):
                    slot.copy_(patches)
        except RuntimeError as error:
            patches = torch.empty(into.shape, dtype=torch.uint8)
            self._decode_cpu(video, patches)
            with torch.cuda.stream(self._stream):
                into.copy_(patches)
            self._warn(error)
        if self._stream is not None:
            self._stream.synchronize()

    def _warn(self, error: RuntimeError) -> None:
        """Say once that the CPU has work that was given to the GPU."""
        if not self._warned:
            self._warned = True
            reason = f"DALI refuses a video that the CPU decodes ({_line(error)})"
            print(f"glmv: warning: {reason}; such videos are decoded on the CPU", file=sys.stderr, flush=True)


def dali_frames(video: EncodedVideo, device: Literal["cpu", "gpu"], patch: int, merge: int) -> Iterator[Tensor]:
    """Patches of a video in pieces that hold GPU_BYTES of decoded frames at most, by DALI alone.

    A batch is asked for its shape and pixels as a whole: a batch and the tensors of its samples refer to each other, so that
    only the garbage collector would free the frames.

    Raises:
        RuntimeError: DALI cannot decode it.
        VideoError: the frames have another size than measured.
    """
    height, width = video.size
    unique = list(dict.fromkeys(video.frame_indices))
    piece = max(1, GPU_BYTES // (3 * height * width))
    target = np.array(video.resized, dtype=np.float32)
    last = torch.empty(0)
    for start in range(0, len(unique), piece):
        with ndd.EvalMode.sync_full:
            data = ndd.as_batch([np.frombuffer(video.data, dtype=np.uint8)])
            frames = ndd.decoders.video(data, device=device, frames=unique[start : start + piece])
            found = tuple(frames.shape[0][1:3])
            if found != video.size:
                raise VideoError(f"decodes to {found[0]} x {found[1]} pixels, {height} x {width} were measured")
            if found != video.resized:
                frames = ndd.resize(frames, size=target, interp_type=types.INTERP_CUBIC, antialias=True)
            for pixels in frames.torch()[0]:
                last = cut_patches(pixels, patch, merge)
                yield last
            if device == "gpu":
                torch.cuda.current_stream().synchronize()  # the frames are DALI's again, and are still read until then
    yield from [last] * (len(video.frame_indices) - len(unique))


def _read_frames(video: EncodedVideo, num_threads: int) -> Iterator[tuple[int, VideoFrame]]:
    """The wanted frames and their indices, ascending; decoding starts at the key frames before them, or once at the front."""
    wanted = sorted(set(video.frame_indices))
    given = 0
    with open_video(video.data) as (container, stream):
        timeline = _Timeline.read(container, stream)
    if timeline is not None:
        for index, frame in _jump(video, wanted, timeline, num_threads):
            yield index, frame
            given += 1
    if given < len(wanted):
        yield from _count_up(video, wanted[given:], num_threads)


@dataclass(frozen=True)
class _Timeline:
    """When frames are shown.

    Attributes:
        shown: times of the frames in the order of display, all different.
        keys: (time, time of decoding) of the key frames, ascending.
    """

    shown: list[int]
    keys: list[tuple[int, int]]

    @classmethod
    def read(cls, container: InputContainer, stream: VideoStream) -> _Timeline | None:
        """From the packets, undecoded; None where they do not say: AVI has no times, those of its packets are made up."""
        if container.format.name == "avi":
            return None
        shown: list[int] = []
        keys: list[tuple[int, int]] = []
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.pts is None:
                return None
            if packet.is_keyframe:
                keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
            if not packet.is_discard:
                shown.append(packet.pts)
        return cls(sorted(shown), sorted(keys)) if len(set(shown)) == len(shown) and keys else None


def _jump(
    video: EncodedVideo, wanted: Sequence[int], timeline: _Timeline, num_threads: int
) -> Iterator[tuple[int, VideoFrame]]:
    """Wanted frames by their times, from key frame to key frame; ends early where a frame does not come."""
    if wanted[-1] >= len(timeline.shown):
        raise VideoError(f"frame {wanted[-1]} was planned, the video has {len(timeline.shown)}")
    times = [key[0] for key in timeline.keys]
    with open_video(video.data) as (container, stream):
        _use_threads(stream, num_threads)
        for key, group in groupby(wanted, lambda index: bisect_right(times, timeline.shown[index]) - 1):
            due = deque((timeline.shown[index], index) for index in group)
            container.seek(timeline.keys[max(key, 0)][1], stream=stream)
            for frame in container.decode(stream):
                if frame.pts is None or frame.pts > due[0][0]:
                    return
                if frame.pts == due[0][0]:
                    yield due.popleft()[1], _checked(frame, video)
                if not due:
                    break
            if due:
                return


def _count_up(video: EncodedVideo, wanted: Sequence[int], num_threads: int) -> Iterator[tuple[int, VideoFrame]]:
    """Wanted frames by counting from the front, for files whose times or key frames cannot be trusted."""
    due = deque(wanted)
    number = -1
    with open_video(video.data) as (container, stream):
        _use_threads(stream, num_threads)
        for number, frame in enumerate(container.decode(stream)):
            if number == due[0]:
                yield due.popleft(), _checked(frame, video)
            if not due:
                return
    raise VideoError(f"frame {due[0]} was planned, {number + 1} decode")


def _use_threads(stream: VideoStream, num_threads: int) -> None:
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = num_threads


def _checked(frame: VideoFrame, video: EncodedVideo) -> VideoFrame:
    if frame.is_corrupt:
        raise VideoError(f"the frame at {frame.time} s is damaged")
    if (frame.height, frame.width) != video.size:
        height, width = video.size
        raise VideoError(f"decodes to {frame.height} x {frame.width} pixels, {height} x {width} were measured")
    return frame


def _line(error: RuntimeError) -> str:
    return " ".join(str(error).split())[:200]
