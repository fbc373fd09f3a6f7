"""`glmv-data grounding`: boxes of phrases or categories as conversations, in the convention in which GLM-4.1V writes boxes.

A box is `[x1,y1,x2,y2]` in thousandths of width and height, 0 to 999, inside the box tokens; several of one phrase stand in one
list. Sizes come from the pictures themselves; boxes made for another size are refused, as nothing says how to scale them.

Source: GLM-4.1V-Thinking (arXiv 2507.01006v6) sections 3.1 (samples with at least two valid boxes stay) and 4; per-mille inside
box tokens: zai-org/GLM-V issues 112 and 114. COCO's annotation format: images, annotations with bbox [x, y, width, height].
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from data_tools.corpus import arguments, jsonl
from data_tools.corpus.checks import Loaded
from data_tools.corpus.faults import Dropped, Fault
from data_tools.corpus.formats import check_text
from data_tools.corpus.media import Place, Record
from data_tools.corpus.pipeline import Context
from data_tools.corpus.reader import CorpusError
from data_tools.corpus.record import build_record, parse_json
from megatron_glmv.data.sample import Item, Message

QUESTION = "Where is {phrase}? Answer with the boxes of all that are there."
DESCRIBE = "Describe the picture and give the box of everything that you name."
REASONS = {"boxes_few": "fewer than --min-boxes valid boxes (finite, in the picture, at least one thousandth wide and high)"}
BOXES = "grounding_boxes"
"""Where boxes wait in a sample's extra fields until its picture's size is known."""


@dataclass(frozen=True)
class BoxChunk:
    """A run of pictures with boxes: lines of a JSONL file, or images of a COCO file.

    Attributes:
        number: counts over all files.
        path: the file.
        label: what messages call it.
        run: items before it, its items, and for JSONL the byte it starts at.
        roots: folders of the pictures.
    """

    number: int
    path: Path
    label: str
    run: tuple[int, int, int]
    roots: tuple[Path, ...]

    def read(self) -> Iterator[Record | Dropped]:
        """Pictures with boxes in extra fields; the conversation is made when the picture's size is known."""
        if self.path.suffix == ".jsonl":
            for source, offset, line in jsonl.read_lines(self.path, *self.run, self.label):
                yield line if isinstance(line, Dropped) else self._build(line, source, offset)
            return
        first, count, _ = self.run
        for number, tree in enumerate(load_coco(self.path)[first : first + count], start=first + 1):
            yield self._build(tree, f"{self.label}:{number}", 0)

    def _build(self, entry: bytes | dict[str, Any], source: str, offset: int) -> Record | Dropped:
        try:
            tree = parse_json(entry) if isinstance(entry, bytes) else entry
            boxes, size = _read_boxes(tree), [tree.get("width"), tree.get("height")]
            caption = tree.get("caption", "")
            check_text(caption)
            plain = {name: value for name, value in tree.items() if name not in ("boxes", "caption")}
            record = build_record(plain | {"caption": caption}, source, Place("line", str(self.path), offset), self.roots)
        except Fault as fault:
            return fault.dropped(source)
        return replace(record, extra=record.extra | {BOXES: (boxes, size, caption)})


def _read_boxes(tree: Mapping[str, Any]) -> list[tuple[str, list[float]]]:
    """Phrases and boxes x1, y1, x2, y2 in pixels; a box that is no list of four numbers has NaN for them."""
    entries = tree.get("boxes")
    if not isinstance(entries, list):
        raise Fault("sample_invalid", "no list of boxes")
    boxes = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise Fault("sample_invalid", "a box is not an object with phrase and box")
        check_text(entry.get("phrase"))
        box = entry.get("box")
        is_box = isinstance(box, list) and len(box) == 4 and all(isinstance(edge, int | float) for edge in box)
        boxes.append((entry["phrase"].strip(), [float(edge) for edge in box] if is_box and box else [math.nan] * 4))
    return boxes


@lru_cache(maxsize=1)
def load_coco(path: Path) -> list[dict[str, Any]]:
    """The images of a COCO annotation file, in its order, as the lines of a JSONL file would be.

    Raises:
        CorpusError: not such a file.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        names = {entry["id"]: entry["name"] for entry in tree["categories"]}
        boxes = defaultdict(list)
        for entry in tree["annotations"]:
            x, y, width, height = entry["bbox"] if len(entry.get("bbox", ())) == 4 else [math.nan] * 4
            if not entry.get("iscrowd"):
                boxes[entry["image_id"]].append({"phrase": names[entry["category_id"]], "box": [x, y, x + width, y + height]})
        return [
            {"id": entry["id"], "image": entry["file_name"], "width": entry.get("width"), "height": entry.get("height"),
             "boxes": boxes[entry["id"]]} for entry in tree["images"]
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{path}: not a COCO annotation file ({type(error).__name__} {error})") from None


@dataclass(frozen=True)
class Grounding:
    """The tool.

    Attributes:
        min_boxes: valid boxes of a sample that stays.
        style: a question for each phrase, or the caption with boxes behind its phrases.
        max_turns: most questions about one picture.
    """

    min_boxes: int = 2
    style: Literal["phrases", "caption"] = "phrases"
    max_turns: int = 8
    name: str = "grounding"

    def settings(self) -> dict[str, Any]:
        """All of it."""
        return {"min_boxes": self.min_boxes, "style": self.style, "max_turns": self.max_turns}

    def apply(self, samples: Iterator[Loaded], context: Context) -> Iterator[Loaded | tuple[Loaded, Dropped]]:
        """Conversations about pictures with enough valid boxes."""
        for loaded in samples:
            record = loaded.record
            boxes, size, caption = record.extra[BOXES]
            width, height = loaded.media[0].width, loaded.media[0].height
            if None not in size and size != [width, height]:
                detail = f"boxes for {size[0]} x {size[1]}, the picture has {width} x {height}"
                yield loaded, Dropped(record.source, record.sample.key, "size_differs", detail)
                continue
            found: dict[str, list[list[int]]] = {}
            for phrase, box in boxes:
                scaled = scale_box(box, width, height)
                if scaled and phrase and scaled not in found.setdefault(phrase, []):
                    found[phrase].append(scaled)
            valid = sum(map(len, found.values()))
            if valid < self.min_boxes:
                yield loaded, Dropped(record.source, record.sample.key, "boxes_few", f"{valid} of {len(boxes)}", is_fault=False)
                continue
            extra = {name: value for name, value in record.extra.items() if name not in (BOXES, "width", "height")}
            sample = replace(record.sample, messages=self._converse(record, found, caption))
            yield replace(loaded, record=replace(record, sample=sample, extra=extra))

    def _converse(self, record: Record, found: dict[str, list[list[int]]], caption: str) -> tuple[Message, ...]:
        picture = record.sample.messages[0].content[0]
        described = insert_boxes(caption, found)
        if self.style == "caption" and described != caption:
            turns = [(DESCRIBE, described)]
        else:
            named = [(phrase, boxes) for phrase, boxes in found.items() if boxes]
            turns = [(QUESTION.format(phrase=phrase), write_boxes(boxes)) for phrase, boxes in named[: self.max_turns]]
        messages = []
        for number, (question, answer) in enumerate(turns):
            messages.append(Message("user", ((picture,) if number == 0 else ()) + (Item("text", question),)))
            messages.append(Message("assistant", (Item("text", answer),)))
        return tuple(messages)


def scale_box(box: list[float], width: int, height: int) -> list[int] | None:
    """A box in thousandths of the picture, cut to it; None for one that is not finite or leaves nothing.

    Args:
        box: x1, y1, x2, y2 in pixels, the far edges exclusive.
        width: of the picture in pixels.
        height: of the picture in pixels.
    """
    if not all(map(math.isfinite, box)):
        return None
    sizes = (width, height, width, height)
    cut = [min(max(edge, 0.0), size) for edge, size in zip(box, sizes, strict=True)]
    scaled = [min(999, round(1000 * edge / size)) for edge, size in zip(cut, sizes, strict=True)]
    return scaled if scaled[0] < scaled[2] and scaled[1] < scaled[3] else None


def write_boxes(boxes: list[list[int]]) -> str:
    """Boxes as GLM writes them."""
    return f"<|begin_of_box|>[{','.join(json.dumps(box, separators=(',', ':')) for box in boxes)}]<|end_of_box|>"


def insert_boxes(caption: str, found: dict[str, list[list[int]]]) -> str:
    """The caption with the boxes of each phrase behind its first mention; phrases that it does not mention are left out."""
    places = []
    for phrase, boxes in found.items():
        mention = re.search(re.escape(phrase), caption, re.IGNORECASE)
        if mention and boxes:
            places.append((mention.start(), mention.end(), boxes))
    parts, end = [], 0
    for start, behind, boxes in sorted(places):
        if start >= end:
            parts.append(f"{caption[end:behind]} {write_boxes(boxes)}")
            end = behind
    return "".join(parts) + caption[end:]


def list_box_chunks(inputs: list[Path], size: int, roots: tuple[Path, ...]) -> list[BoxChunk]:
    """Cut annotation files into chunks.

    Raises:
        CorpusError: a file that is neither .jsonl nor .json, or not readable as such.
    """
    chunks: list[BoxChunk] = []
    for path in inputs:
        if path.suffix not in (".json", ".jsonl") or not path.is_file():
            raise CorpusError(f"{path}: not a .json (COCO) or .jsonl file of boxes")
        own = roots or (path.parent.resolve(),)
        if path.suffix == ".jsonl":
            runs = list(jsonl.list_runs(path, size))
        else:
            total = len(load_coco(path))
            runs = [(first, min(size, total - first), 0) for first in range(0, total, size)]
        chunks += [BoxChunk(len(chunks) + place, path, path.name, run, own) for place, run in enumerate(runs)]
    return chunks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glmv-data grounding`."""
    parser.description = (
        "Makes conversations of boxes. INPUT is COCO's annotation JSON, or JSONL with a line a picture:\n"
        '  {"id": 7, "image": "a.jpg", "caption": "a cat and a dog", "boxes": [{"phrase": "a cat", "box": [x1, y1, x2, y2]}]}\n'
        "Boxes are in pixels. A COCO file is read whole by every process; convert very large ones to JSONL.\n\n"
        f"reasons:\n  boxes_few  {REASONS['boxes_few']}\n{arguments.HELP}"
    )
    arguments.add_arguments(parser)
    group = parser.add_argument_group("boxes")
    group.add_argument("--min-boxes", type=int, default=2, help="valid boxes of a sample that stays (default %(default)s)")
    group.add_argument("--style", choices=("phrases", "caption"), default="phrases",
                       help="a question for each phrase, or the caption with boxes in it (default %(default)s)")  # fmt: skip
    group.add_argument("--max-turns", type=int, default=8, help="questions about one picture (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Run the tool and print its report.

    Raises:
        CorpusError: no input, or one that cannot be used.
    """
    settings = arguments.read_settings(args)
    *inputs, out = args.paths
    if not inputs or args.min_boxes < 1 or args.max_turns < 1:
        raise CorpusError("name at least one INPUT and the folder OUT; --min-boxes and --max-turns at least 1")
    chunks = list_box_chunks(inputs, args.chunk, tuple(root.resolve() for root in args.media_root))
    described = {"inputs": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in inputs], "chunk": args.chunk}
    arguments.run_chunks(args, Grounding(args.min_boxes, args.style, args.max_turns), settings, chunks, out, described)
