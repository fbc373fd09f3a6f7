"""`glmv-data digits`: pictures composed of real handwritten digits, with questions whose answers can be checked.

Scikit-learn ships 1,797 scans of 8 x 8 pixels. The scans are divided before anything is composed, and the division does not
depend on the seed, so a held-out picture never shows a scan that any training picture showed. Every sample has a random
generator of its own, keyed by (seed, split, number): the data set does not depend on how often the tool was interrupted.

Pictures are made for a model of a million parameters: a digit fills about one merged token, and all pictures of a kind have one
size, because GLM's position table is stretched over the whole picture and would otherwise name another column in each.

Source: scikit-learn 1.9.1, `sklearn.datasets.load_digits` (the test part of UCI's optical recognition of handwritten digits).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

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
GRID_COLUMNS = 4
"""Cells a row of the pictures with two rows."""
NUM_HELD_OUT = 360
SPLITS = ("train", "eval")
REPORT = "digits.json"

HELP = """\
Writes OUT/images/{train,eval}/*.png, OUT/train.jsonl, OUT/eval.jsonl and OUT/digits.json.

Tasks, mixed by --mixture:
  read   1 to 8 digits in a row            "Read the digits."               -> 4073
  count  digits on a grid                  "How many digits are there?"     -> 5
                                           "How often does 3 appear?"       -> 2
  add    two digits in a row               "What is the sum of the digits?" -> 14
  point  a digit of a row, seen once       "Where is the digit 7?"          -> <|begin_of_box|>[[x1,y1,x2,y2]]<|end_of_box|>
         (per mille of width and height, 0 to 999, as GLM-4.1V writes boxes)

Of the 1,797 scans 360 are held out (stratified, the same for every seed); eval pictures use only those.
The same arguments and seed give the same bytes. An interrupted run continues; a complete folder is left as it is."""


@dataclass(frozen=True)
class Plan:
    """What decides the contents of a data set."""

    seed: int
    train: int
    eval: int
    mixture: dict[str, float]
    max_digits: int
    length_skew: float = 1.0
    """Training rows of n digits are drawn with weight n ** -skew: short ones teach the digits first; eval rows are uniform."""


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
class Picture:
    """A composed picture and what is on it, in reading order.

    Attributes:
        pixels: [height, width, 3] uint8.
        digits: what was placed.
        scans: which scan of scikit-learn's data set each of them is.
        boxes: x1, y1, x2, y2 of the ink of each, in pixels, the far edges exclusive.
    """

    pixels: npt.NDArray[np.uint8]
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
            random: np.random.Generator) -> Picture:  # fmt: skip
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
    return Picture(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), scans.labels[chosen].tolist(),
                   scans.numbers[chosen].tolist(), boxes)  # fmt: skip


def in_a_row(scans: Scans, count: int, columns: int, random: np.random.Generator) -> Picture:
    """`count` digits side by side from the left of a row of `columns` cells."""
    cells = [(0, column) for column in range(count)]
    return compose(scans, random.integers(len(scans.labels), size=count), cells, (1, columns), random)


def on_a_grid(scans: Scans, count: int, random: np.random.Generator) -> Picture:
    """`count` digits in random cells of two rows."""
    places = np.sort(random.choice(2 * GRID_COLUMNS, size=count, replace=False))
    cells = [(int(place) // GRID_COLUMNS, int(place) % GRID_COLUMNS) for place in places]
    return compose(scans, random.integers(len(scans.labels), size=count), cells, (2, GRID_COLUMNS), random)


def make_read(scans: Scans, plan: Plan, random: np.random.Generator) -> tuple[Picture, str, str, dict[str, Any]]:
    """Digits of a row from left to right."""
    lengths = np.arange(1, plan.max_digits + 1)
    weights = lengths**-plan.length_skew
    count = int(random.choice(lengths, p=weights / weights.sum()))
    picture = in_a_row(scans, count, plan.max_digits, random)
    return picture, "Read the digits.", "".join(map(str, picture.digits)), {}


def make_count(scans: Scans, plan: Plan, random: np.random.Generator) -> tuple[Picture, str, str, dict[str, Any]]:
    """How many digits there are, or how many of one kind."""
    picture = on_a_grid(scans, int(random.integers(1, 9)), random)
    if random.random() < 0.5:
        return picture, "How many digits are there?", str(len(picture.digits)), {}
    digit = int(random.choice(picture.digits)) if random.random() < 0.8 else int(random.integers(10))
    return picture, f"How often does {digit} appear?", str(picture.digits.count(digit)), {"digit": digit}


def make_add(scans: Scans, plan: Plan, random: np.random.Generator) -> tuple[Picture, str, str, dict[str, Any]]:
    """The sum of two digits."""
    picture = in_a_row(scans, 2, max(2, plan.max_digits), random)
    return picture, "What is the sum of the digits?", str(sum(picture.digits)), {}


def make_point(scans: Scans, plan: Plan, random: np.random.Generator) -> tuple[Picture, str, str, dict[str, Any]]:
    """The box of a digit that is seen once."""
    while True:
        picture = in_a_row(scans, int(random.integers(2, 7)), max(6, plan.max_digits), random)
        once = [i for i, digit in enumerate(picture.digits) if picture.digits.count(digit) == 1]
        if once:
            break
    target = int(random.choice(once))
    digit, box = picture.digits[target], picture.boxes[target]
    height, width = picture.pixels.shape[:2]
    x1, y1, x2, y2 = (min(999, round(1000 * edge / size)) for edge, size in zip(box, (width, height) * 2, strict=True))
    answer = f"<|begin_of_box|>[[{x1},{y1},{x2},{y2}]]<|end_of_box|>"
    return picture, f"Where is the digit {digit}?", answer, {"digit": digit, "box": box}


TASKS: dict[str, Callable[[Scans, Plan, np.random.Generator], tuple[Picture, str, str, dict[str, Any]]]] = {
    "read": make_read, "count": make_count, "add": make_add, "point": make_point,
}  # fmt: skip
DEFAULT_MIXTURE = {"read": 0.7, "count": 0.1, "add": 0.1, "point": 0.1}


def make_sample(scans: Scans, plan: Plan, split: str, number: int) -> tuple[dict[str, Any], npt.NDArray[np.uint8]]:
    """Sample `number` of a split.

    Returns:
        The record of the JSONL file, and the picture that it names: [height, width, 3] uint8.
    """
    random = np.random.default_rng([plan.seed, SPLITS.index(split), number])
    shares = np.array([plan.mixture[task] for task in TASKS])
    if split == "eval":
        plan = replace(plan, length_skew=0.0)
    task = list(TASKS)[int(random.choice(len(TASKS), p=shares / shares.sum()))]
    picture, question, answer, extra = TASKS[task](scans, plan, random)
    height, width = picture.pixels.shape[:2]
    image = f"images/{split}/{number:06d}.png"
    record = {
        "id": f"{split}-{task}-{number:06d}", "task": task, "answer": answer, "digits": picture.digits, "scans": picture.scans,
        "width": width, "height": height, **extra,
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
    }  # fmt: skip
    return record, picture.pixels


def write_split(out: Path, scans: Scans, plan: Plan, split: str, num_samples: int) -> None:
    """Write the samples of one split that are not there yet; the JSONL file gets its name when it is complete."""
    final, partial = out / f"{split}.jsonl", out / f"{split}.jsonl.partial"
    if final.exists():
        return
    (out / "images" / split).mkdir(parents=True, exist_ok=True)
    done = _keep_whole_lines(partial)
    with partial.open("a", encoding="utf-8") as lines:
        bar = {"initial": done, "total": num_samples, "desc": f"digits {split}", "unit": " pictures"}
        for number in tqdm(range(done, num_samples), **bar):
            record, pixels = make_sample(scans, plan, split, number)
            path = out / record["messages"][0]["content"][0]["image"]
            Image.fromarray(pixels).save(path, compress_level=1)
            lines.write(json.dumps(record) + "\n")
    partial.rename(final)


def _keep_whole_lines(path: Path) -> int:
    """Cut what a killed run left of its last line; returns the number of lines that stay."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    return whole.count(b"\n")


def write_digits(out: Path, plan: Plan) -> dict[str, Any]:
    """Write the data set, or what is missing of it.

    Returns:
        The report that is also saved as digits.json.

    Raises:
        ValueError: `out` holds a data set made with other arguments.
    """
    report = {"tool": "digits", "arguments": asdict(plan)}
    path = out / REPORT
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["arguments"] != report["arguments"]:
        raise ValueError(f"{path}: the folder holds a data set made with other arguments; remove it or choose another OUT")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not all((out / f"{split}.jsonl").exists() for split in SPLITS):
        scans = load_scans()
        for split in SPLITS:
            write_split(out, scans[split], plan, split, getattr(plan, split))
    return report | {"tasks": {split: _count_tasks(out / f"{split}.jsonl") for split in SPLITS}}


def _count_tasks(path: Path) -> dict[str, int]:
    counts = dict.fromkeys(TASKS, 0)
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            counts[json.loads(line)["task"]] += 1
    return counts


def parse_mixture(text: str) -> dict[str, float]:
    """`read=0.6,count=0.4` -> shares; tasks that are not named get 0.

    Raises:
        ArgumentTypeError: an unknown task, a share that is no number or negative, or no positive share.
    """
    shares = dict.fromkeys(TASKS, 0.0)
    for part in text.split(","):
        task, _, share = part.partition("=")
        try:
            shares[task.strip()] = float(share)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not TASK=SHARE") from None
    if set(shares) != set(TASKS) or min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: shares of {', '.join(TASKS)}, none negative, at least one positive")
    return shares


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glmv-data digits`."""
    parser.description = HELP
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="decides every picture (default %(default)s)")
    parser.add_argument("--train", type=int, default=16_000, help="training samples (default %(default)s)")
    parser.add_argument("--eval", type=int, default=480, help="held-out samples (default %(default)s)")
    parser.add_argument("--mixture", type=parse_mixture, default=DEFAULT_MIXTURE, metavar="TASK=SHARE,...",
                        help="share of each task (default read=0.7,count=0.1,add=0.1,point=0.1)")  # fmt: skip
    parser.add_argument("--max-digits", type=int, default=8, choices=range(1, 17), metavar="1..16",
                        help="longest row of the task read (default %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Run the tool and print its report."""
    if args.train < 1 or args.eval < 1 or args.seed < 0:
        raise ValueError("--train and --eval must be at least 1, --seed at least 0")
    plan = Plan(args.seed, args.train, args.eval, args.mixture, args.max_digits)
    print(json.dumps(write_digits(args.out, plan)))
