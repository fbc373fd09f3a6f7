"""`glmv-data digits`: pictures and clips of real handwritten digits, with questions whose answers can be checked.

Every sample has a random generator of its own, keyed by (seed, split, number): the data set does not depend on how often the
tool was interrupted. A record serves twice: its messages are what is trained, and its domain, subcategory and answer are what
reinforcement learning reads.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_tools.handwriting import (
    SPLITS,
    Drawing,
    Scans,
    in_a_row,
    load_scans,
    one_by_one,
    scattered,
    write_clip,
    write_picture,
)

REPORT = "digits.json"

GRID = (2, 4)
"""Rows and columns of the pictures with two rows."""
LONGEST_CLIP = 5
"""Digits of the longest clip."""

HELP = """\
Writes OUT/images/{train,eval}/*.png, OUT/videos/{train,eval}/*.mp4, OUT/train.jsonl, OUT/eval.jsonl and OUT/digits.json.

Tasks, mixed by --mixture; eval has all that are mixed in, in equal shares:
  read   1 to 8 digits in a row            "Read the digits."               -> 4073
  count  digits on a grid                  "How many digits are there?"     -> 5
                                           "How often does 3 appear?"       -> 2
  add    two digits in a row               "What is the sum of the digits?" -> 14
  point  one of 1 to 6 digits in a row     "Where is the digit 7?"          -> <|begin_of_box|>[[x1,y1,x2,y2]]<|end_of_box|>
         with gaps; per mille of width and height, 0 to 999, as GLM-4.1V writes boxes
  watch  1 to 5 digits, one after the      "Which digits appear, in order?" -> 407
         other, a second each, in a video

Beside its messages a record has what `glmv rl` and `glmv reward` read: the verifier's domain (ocr, counting, grounding, video),
the task as subcategory, and the answer: a text, or for point a list of boxes.

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
    """Training samples of n digits are drawn with weight n ** -skew: short ones teach the digits first; eval is uniform."""


@dataclass(frozen=True)
class Question:
    """A drawing with what is asked about it.

    Attributes:
        drawing: the picture or clip.
        text: of the question.
        written: the answer as it is trained.
        answer: the answer as the domain's verifier reads it; None: as written.
        extra: further keys of the record.
    """

    drawing: Drawing
    text: str
    written: str
    answer: Any = None
    extra: dict[str, Any] = field(default_factory=dict)


def make_read(scans: Scans, plan: Plan, random: np.random.Generator) -> Question:
    """Digits of a row from left to right."""
    picture = in_a_row(scans, _draw_length(1, plan.max_digits, plan, random), plan.max_digits, random)
    return Question(picture, "Read the digits.", "".join(map(str, picture.digits)))


def make_count(scans: Scans, plan: Plan, random: np.random.Generator) -> Question:
    """How many digits there are, or how many of one kind."""
    picture = scattered(scans, int(random.integers(1, 9)), GRID, random)
    if random.random() < 0.5:
        return Question(picture, "How many digits are there?", str(len(picture.digits)))
    digit = int(random.choice(picture.digits)) if random.random() < 0.8 else int(random.integers(10))
    return Question(picture, f"How often does {digit} appear?", str(picture.digits.count(digit)), extra={"digit": digit})


def make_add(scans: Scans, plan: Plan, random: np.random.Generator) -> Question:
    """The sum of two digits."""
    picture = in_a_row(scans, 2, max(2, plan.max_digits), random)
    return Question(picture, "What is the sum of the digits?", str(sum(picture.digits)))


def make_point(scans: Scans, plan: Plan, random: np.random.Generator) -> Question:
    """The box of a digit that is seen once."""
    while True:
        picture = scattered(scans, _draw_length(1, 6, plan, random), (1, max(6, plan.max_digits)), random)
        once = [i for i, digit in enumerate(picture.digits) if picture.digits.count(digit) == 1]
        if once:
            break
    target = int(random.choice(once))
    digit, box = picture.digits[target], picture.boxes[target]
    height, width = picture.frames.shape[1:3]
    boxes = [[min(999, round(1000 * edge / size)) for edge, size in zip(box, (width, height) * 2, strict=True)]]
    written = f"<|begin_of_box|>{json.dumps(boxes, separators=(',', ':'))}<|end_of_box|>"
    return Question(picture, f"Where is the digit {digit}?", written, boxes, {"digit": digit, "box": box})


def make_watch(scans: Scans, plan: Plan, random: np.random.Generator) -> Question:
    """Digits of a clip in the order of their time."""
    clip = one_by_one(scans, _draw_length(1, LONGEST_CLIP, plan, random), random)
    return Question(clip, "Which digits appear, in order?", "".join(map(str, clip.digits)))


def _draw_length(shortest: int, longest: int, plan: Plan, random: np.random.Generator) -> int:
    lengths = np.arange(shortest, longest + 1)
    weights = lengths**-plan.length_skew
    return int(random.choice(lengths, p=weights / weights.sum()))


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        domain: the verifier that judges its answers (`megatron_glmv/config/rewards.py`).
        make: draws one.
        kind: of its medium.
    """

    domain: str
    make: Callable[[Scans, Plan, np.random.Generator], Question]
    kind: str = "image"


TASKS = {
    "read": Task("ocr", make_read), "count": Task("counting", make_count), "add": Task("counting", make_add),
    "point": Task("grounding", make_point), "watch": Task("video", make_watch, "video"),
}  # fmt: skip
DEFAULT_MIXTURE = {"read": 0.62, "count": 0.1, "add": 0.1, "point": 0.16, "watch": 0.02}


def make_sample(scans: Scans, plan: Plan, split: str, number: int) -> tuple[dict[str, Any], Drawing]:
    """Sample `number` of a split.

    Returns:
        The record of the JSONL file, and the picture or clip that it names.
    """
    random = np.random.default_rng([plan.seed, SPLITS.index(split), number])
    shares = np.array([plan.mixture[name] for name in TASKS])
    if split == "eval":
        plan = replace(plan, length_skew=0.0)
        shares = (shares > 0).astype(float)
    name = list(TASKS)[int(random.choice(len(TASKS), p=shares / shares.sum()))]
    task = TASKS[name]
    question = task.make(scans, plan, random)
    drawing, answer = question.drawing, question.written if question.answer is None else question.answer
    height, width = drawing.frames.shape[1:3]
    path = f"videos/{split}/{number:06d}.mp4" if task.kind == "video" else f"images/{split}/{number:06d}.png"
    record = {
        "id": f"{split}-{name}-{number:06d}", "task": name, "domain": task.domain, "subcategory": name, "answer": answer,
        "digits": drawing.digits, "scans": drawing.scans, "width": width, "height": height, **question.extra,
        "messages": [
            {"role": "user", "content": [{"type": task.kind, task.kind: path}, {"type": "text", "text": question.text}]},
            {"role": "assistant", "content": [{"type": "text", "text": question.written}]},
        ],
    }  # fmt: skip
    return record, drawing


def write_split(out: Path, scans: Scans, plan: Plan, split: str, num_samples: int) -> None:
    """Write the samples of one split that are not there yet; the JSONL file gets its name when it is complete."""
    final, partial = out / f"{split}.jsonl", out / f"{split}.jsonl.partial"
    if final.exists():
        return
    for folder in ("images", "videos"):
        (out / folder / split).mkdir(parents=True, exist_ok=True)
    done = _keep_whole_lines(partial)
    with partial.open("a", encoding="utf-8") as lines:
        bar = {"initial": done, "total": num_samples, "desc": f"digits {split}", "unit": " samples"}
        for number in tqdm(range(done, num_samples), **bar):
            record, drawing = make_sample(scans, plan, split, number)
            medium = record["messages"][0]["content"][0]
            path = out / medium[medium["type"]]
            write_clip(path, drawing) if medium["type"] == "video" else write_picture(path, drawing)
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
    parser.add_argument("--seed", type=int, default=0, help="decides every sample (default %(default)s)")
    parser.add_argument("--train", type=int, default=16_000, help="training samples (default %(default)s)")
    parser.add_argument("--eval", type=int, default=480, help="held-out samples (default %(default)s)")
    default = ",".join(f"{task}={share}" for task, share in DEFAULT_MIXTURE.items())
    parser.add_argument("--mixture", type=parse_mixture, default=DEFAULT_MIXTURE, metavar="TASK=SHARE,...",
                        help=f"share of each task (default {default})")  # fmt: skip
    parser.add_argument("--max-digits", type=int, default=8, choices=range(1, 17), metavar="1..16",
                        help="longest row of the task read (default %(default)s)")  # fmt: skip
    parser.add_argument("--length-skew", type=float, default=1.0, metavar="X",
                        help="training samples of n digits are as frequent as n to the power of -X; 0: all lengths alike, "
                             "as in eval (default %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Run the tool and print its report."""
    if args.train < 1 or args.eval < 1 or args.seed < 0:
        raise ValueError("--train and --eval must be at least 1, --seed at least 0")
    if not math.isfinite(args.length_skew):
        raise ValueError("--length-skew must be a finite number")
    plan = Plan(args.seed, args.train, args.eval, args.mixture, args.max_digits, args.length_skew)
    print(json.dumps(write_digits(args.out, plan)))
