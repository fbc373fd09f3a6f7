"""Real handwritten digits placed in pictures and in clips, and the files that hold them.

Scikit-learn ships 1,797 scans of 8 x 8 pixels. The scans are divided before anything is composed, and the division does not
depend on the seed, so a held-out picture never shows a scan that any training picture showed.

Pictures are made for a model of a million parameters: a digit fills about one merged token, and all pictures of a kind have one
size, because GLM's position table is stretched over the whole picture and would otherwise name another column in each. A clip
shows a digit for as long as one temporal patch takes.

Source: scikit-learn 1.9.1, `sklearn.datasets.load_digits` (the test part of UCI's optical recognition of handwritten digits);
transformers 5.23.0, models/glm4v/video_processing_glm4v.py (2 frames a second are sampled, a temporal patch covers 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CELL = 28
"""Side of a digit's cell in pixels: one merged token of GLM-4.1V (patch 14, merge 2)."""
SIZES = (23, 25)
"""Sides in pixels that a scan is enlarged to."""
JITTER = 1
"""Largest shift of a digit from the middle of its cell, in pixels."""
INK_VISIBLE = 0.25
"""Ink above this share of the darkest belongs to the digit's box."""
WARPS = ((0, 0.0), (-10, 0.0), (10, 0.0), (0, -0.2), (0, 0.2), (-6, 0.15), (6, -0.15))
"""Degrees of turn and shear that training scans appear under; held-out scans appear only as they are, the first of these."""
PRESSURE = (0.8, 1.25)
"""Exponents of the ink of training scans: thicker and thinner pens."""
NUM_HELD_OUT = 360
SPLITS = ("train", "eval")
FPS = 2
"""Frames a second of a clip; GLM-4.1V samples as many, so every frame is seen."""
FRAMES_PER_DIGIT = 2
"""Frames that one temporal patch covers."""
CLIP_CODEC = {"preset": "fast", "crf": "2", "bf": "0", "threads": "1"}
"""libx264: hardly more is lost than by the conversion of colours; the same bytes whatever the number of cores."""


@dataclass(frozen=True)
class Scans:
    """Enlarged scans of one split.

    Attributes:
        labels: [n] the digit of each scan.
        numbers: [n] position of each scan in scikit-learn's data set.
        ink: for each side in SIZES, [warps, n, side, side] float32, 0 paper to 1 ink; one warp, the scan as it is, if held out.
    """

    labels: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    ink: dict[int, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Drawing:
    """A composed picture, or clip, and what is on it, in reading order.

    Attributes:
        frames: [1 for a picture, else frames of a clip, height, width, 3] uint8.
        digits: what was placed.
        scans: which scan of scikit-learn's data set each of them is.
        boxes: x1, y1, x2, y2 of the ink of each, in pixels, the far edges exclusive.
    """

    frames: npt.NDArray[np.uint8]
    digits: list[int]
    scans: list[int]
    boxes: list[list[int]]


def load_scans() -> dict[str, Scans]:
    """The scans of each split, enlarged; held-out scans are the same whatever the seed of a data set."""
    data = load_digits()
    numbers = np.arange(len(data.target))
    train, held_out = train_test_split(numbers, test_size=NUM_HELD_OUT, stratify=data.target, random_state=0)
    splits = {}
    for split, chosen in zip(SPLITS, (np.sort(train), np.sort(held_out)), strict=True):
        small = [Image.fromarray((scan * 255 / 16).astype(np.float32), mode="F") for scan in data.images[chosen]]
        ink = {}
        warps = WARPS if split == "train" else WARPS[:1]
        for side in SIZES:
            large = [scan.resize((side, side), Image.Resampling.BICUBIC) for scan in small]
            warped = np.stack([[np.asarray(warp_scan(scan, *warp)) for scan in large] for warp in warps])
            ink[side] = (np.clip(warped, 0, 255) / 255).astype(np.float32)
        splits[split] = Scans(data.target[chosen], chosen, ink)
    return splits


def warp_scan(scan: Image.Image, degrees: float, shear: float) -> Image.Image:
    """Turn and shear a square scan about its middle."""
    if not degrees and not shear:
        return scan
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    across = (cos, sin + shear * cos)
    down = (-sin, cos - shear * sin)
    middle = (scan.width - 1) / 2
    shifts = [middle - middle * sum(row) for row in (across, down)]
    matrix = (*across, shifts[0], *down, shifts[1])
    return scan.transform(scan.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC)


def compose(scans: Scans, chosen: npt.NDArray[np.int64], cells: list[tuple[int, int]], shape: tuple[int, int],
            random: np.random.Generator) -> Drawing:  # fmt: skip
    """Place scans on tinted paper.

    Args:
        scans: to choose from.
        chosen: [n] indexes into `scans`.
        cells: (row, column) of each of them, in cells.
        shape: rows and columns of the picture in cells.
        random: decides sizes, shifts, tints.
    """
    height, width = shape[0] * CELL, shape[1] * CELL
    ink = np.zeros((height, width), dtype=np.float32)
    boxes = []
    sides = random.choice(SIZES, size=len(chosen))
    variants = random.integers(len(scans.ink[SIZES[0]]), size=len(chosen))
    pressure = random.uniform(*PRESSURE, size=len(chosen)) if len(scans.ink[SIZES[0]]) > 1 else np.ones(len(chosen))
    shifts = random.integers(-JITTER, JITTER + 1, size=(len(chosen), 2))
    looks = zip(chosen, cells, sides, variants, pressure, shifts, strict=True)
    for index, (row, column), side, variant, exponent, shift in looks:
        room = CELL - side
        top = row * CELL + int(np.clip(room // 2 + shift[0], 0, room))
        left = column * CELL + int(np.clip(room // 2 + shift[1], 0, room))
        scan = scans.ink[int(side)][variant, index] ** exponent
        ink[top : top + side, left : left + side] = scan
        ys, xs = np.nonzero(scan > INK_VISIBLE)
        boxes.append([left + int(xs.min()), top + int(ys.min()), left + int(xs.max()) + 1, top + int(ys.max()) + 1])
    paper = random.uniform(215, 250) + random.uniform(-8, 8, size=3)
    pen = random.uniform(20, 80) + random.uniform(-10, 10, size=3)
    left_light, right_light = random.uniform(-5, 5, size=2).tolist()
    light = np.linspace(left_light, right_light, num=width)[:, None]
    pixels = paper + light + ink[..., None] * (pen - paper)
    return Drawing(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)[None], scans.labels[chosen].tolist(),
                   scans.numbers[chosen].tolist(), boxes)  # fmt: skip


def in_a_row(scans: Scans, count: int, columns: int, random: np.random.Generator) -> Drawing:
    """`count` digits side by side from the left of a row of `columns` cells."""
    cells = [(0, column) for column in range(count)]
    return compose(scans, random.integers(len(scans.labels), size=count), cells, (1, columns), random)


def scattered(scans: Scans, count: int, shape: tuple[int, int], random: np.random.Generator) -> Drawing:
    """`count` digits in random cells of a picture of `shape` rows and columns, in reading order."""
    places = np.sort(random.choice(shape[0] * shape[1], size=count, replace=False))
    cells = [(int(place) // shape[1], int(place) % shape[1]) for place in places]
    return compose(scans, random.integers(len(scans.labels), size=count), cells, shape, random)


def one_by_one(scans: Scans, count: int, random: np.random.Generator) -> Drawing:
    """A clip of one cell in which `count` digits follow each other, on the same paper; the first of several is no zero.

    Without a zero in front, answers that are equal as numbers are equal as texts.
    """
    chosen = random.integers(len(scans.labels), size=count)
    if count > 1:
        chosen[0] = random.choice(np.flatnonzero(scans.labels))
    strip = compose(scans, chosen, [(0, column) for column in range(count)], (1, count), random)
    cells = strip.frames[0].reshape(CELL, count, CELL, 3).swapaxes(0, 1)
    boxes = [[x1 - CELL * i, y1, x2 - CELL * i, y2] for i, (x1, y1, x2, y2) in enumerate(strip.boxes)]
    return Drawing(np.repeat(cells, FRAMES_PER_DIGIT, axis=0), strip.digits, strip.scans, boxes)


def write_picture(path: Path, drawing: Drawing) -> None:
    """Write a drawing of one frame as PNG."""
    (pixels,) = drawing.frames
    Image.fromarray(pixels).save(path, compress_level=1)


def write_clip(path: Path, drawing: Drawing) -> None:
    """Write a drawing as H.264 in MP4, FPS frames a second."""
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options=CLIP_CODEC)
        stream.height, stream.width = drawing.frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in drawing.frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
