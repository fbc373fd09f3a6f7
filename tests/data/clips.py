"""Real encoded videos of every kind that the decoder meets, made by the tests."""

from __future__ import annotations

import io
from fractions import Fraction
from functools import cache

import av
import numpy as np
import numpy.typing as npt

from tests.data.pictures import draw


def draw_frames(number: int, height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """[number, height, width, 3] a window that pans over a large picture, so that no two frames are alike."""
    field = draw(height + 2 * number, width + 3 * number, seed)
    return np.stack([field[2 * i : 2 * i + height, 3 * i : 3 * i + width] for i in range(number)])


@cache
def clip(
    number: int = 31,
    height: int = 60,
    width: int = 100,
    *,
    fps: Fraction | int = 10,
    codec: str = "libx264",
    form: str = "mp4",
    keyframe_every: int = 12,
    seed: int = 0,
    options: tuple[tuple[str, str], ...] = (),
) -> bytes:
    """The bytes of a video file."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options={"threads": "1", **dict(options)})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.gop_size = keyframe_every
        for pixels in draw_frames(number, height, width, seed):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


@cache
def clips() -> dict[str, bytes]:
    """One file of every kind that decodes."""
    return {
        "mp4-h264": clip(),
        "mp4-h264-no-b-frames": clip(options=(("bf", "0"),)),
        "mp4-h264-open-gop": clip(options=(("x264-params", "open-gop=1:bframes=3:scenecut=0"),)),
        "mkv-h264": clip(form="matroska"),
        "webm-vp9": clip(codec="libvpx-vp9", form="webm", options=(("cpu-used", "8"), ("deadline", "realtime"))),
        "webm-vp9-hidden-frames": clip(
            codec="libvpx-vp9", form="webm", options=(("auto-alt-ref", "1"), ("lag-in-frames", "16"))
        ),
        "mp4-h265": clip(codec="libx265", options=(("x265-params", "log-level=none:pools=1"),)),
        "mp4-mpeg4": clip(codec="mpeg4"),
        "mp4-30000/1001": clip(50, fps=Fraction(30000, 1001)),
        "mp4-slow": clip(5, fps=2),
        "mp4-one-frame": clip(1, fps=1),
        "mp4-large": clip(9, 240, 320, fps=3),
    }


@cache
def broken_clips() -> dict[str, bytes]:
    """One file of every kind that does not decode."""
    mp4, webm = clip(), clips()["webm-vp9"]
    streamable = clip(options=(("movflags", "faststart"),))
    return {
        "empty": b"",
        "text": b"<html><body>404 not found</body></html>",
        "noise": np.random.default_rng(0).bytes(3_000),
        "mp4-half": mp4[: len(mp4) // 2],
        "mp4-header-only": mp4[:64],
        "mp4-faststart-half": streamable[: len(streamable) // 2],
        "webm-head": webm[:200],
    }
