"""`glmv-data render-ocr`: pages of rendered text over background pictures, with the text and the box of every line.

Every page has a random generator of its own, keyed by (seed, number), so the set does not depend on chunks, parts or kills. A
line is drawn only in a font that has all its characters: a page of empty boxes would teach to make text up.

Source: GLM-4.1V-Thinking (arXiv 2507.01006v6) section 3.1: synthetic rendered text over backgrounds; sizes and fonts are not in
the paper. matplotlib 3.11.2 ships DejaVu, which has Latin, Greek and Cyrillic letters and no Chinese ones.
"""

from __future__ import annotations

import argparse
import io
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from data_tools.corpus import arguments
from data_tools.corpus.checks import Loaded
from data_tools.corpus.faults import Dropped, Fault
from data_tools.corpus.media import MediaRef, Place, Record
from data_tools.corpus.pipeline import Context
from data_tools.corpus.reader import CorpusError
from data_tools.grounding import scale_box, write_boxes
from megatron_glmv.data.media import MAX_PIXELS
from megatron_glmv.data.sample import Item, Message, Sample

READ = "Read the text in the picture, line by line."
LOCATE = "Where is the line that reads “{line}”?"
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SHAPES = ((448, 448), (560, 392), (392, 560), (672, 448), (448, 672))
"""Width and height of pages in pixels: multiples of a merged token's 28."""
MARGIN = 16


@dataclass(frozen=True)
class Plan:
    """What pages depend on.

    Attributes:
        texts: UTF-8 files; a page takes lines that follow each other.
        fonts: files.
        backgrounds: files; none for generated ones.
        seed: of everything random.
        locate: share of pages that ask for a line's box and not for the text.
        sizes: smallest and largest font in pixels.
    """

    texts: tuple[Path, ...]
    fonts: tuple[Path, ...]
    backgrounds: tuple[Path, ...] = ()
    seed: int = 0
    locate: float = 0.2
    sizes: tuple[int, int] = (14, 36)

    def settings(self) -> dict[str, Any]:
        """Files by name and size."""
        groups = {"texts": self.texts, "fonts": self.fonts, "backgrounds": self.backgrounds}
        files = {name: [[path.name, path.stat().st_size] for path in paths] for name, paths in groups.items()}
        return asdict(self) | files


@dataclass(frozen=True)
class Page:
    """A rendered page: the picture, its lines from top to bottom, and the box of the ink of each in pixels."""

    picture: Image.Image
    lines: list[str]
    boxes: list[list[int]]


@dataclass(frozen=True)
class PageChunk:
    """A run of pages; `number` counts chunks."""

    number: int
    first: int
    count: int
    plan: Plan

    def read(self) -> Iterator[Record | Dropped]:
        """Render the pages."""
        for number in range(self.first, self.first + self.count):
            key = f"page-{number:08d}"
            try:
                yield _make_record(key, self.plan, np.random.default_rng([self.plan.seed, number]))
            except Fault as fault:
                yield fault.dropped(f"pages:{number}", key)


@dataclass(frozen=True)
class Pages:
    """The tool; its chunks do the work."""

    plan: Plan
    name: str = "render-ocr"

    def settings(self) -> dict[str, Any]:
        """Of the plan."""
        return self.plan.settings()

    def apply(self, samples: Iterator[Loaded], context: Context) -> Iterator[Loaded]:
        """Every page."""
        yield from samples


def _make_record(key: str, plan: Plan, random: np.random.Generator) -> Record:
    page = render_page(plan, random)
    picture = Item("image", f"{key}.jpg")
    width, height = page.picture.size
    question, answer = READ, "\n".join(page.lines)
    once = [index for index, line in enumerate(page.lines) if page.lines.count(line) == 1]
    if once and random.random() < plan.locate:
        index = int(random.choice(once))
        box = scale_box([float(edge) for edge in page.boxes[index]], width, height)
        if box is not None:
            question, answer = LOCATE.format(line=page.lines[index]), write_boxes([box])
    buffer = io.BytesIO()
    page.picture.save(buffer, "JPEG", quality=int(random.integers(70, 96)))
    messages = (Message("user", (picture, Item("text", question))), Message("assistant", (Item("text", answer),)))
    lines = [{"text": line, "box": box} for line, box in zip(page.lines, page.boxes, strict=True)]
    ref = MediaRef("image", picture.value, Place("line", key), buffer.getvalue())
    return Record(Sample(key, messages, Path()), (ref,), key, {"lines": lines})


def render_page(plan: Plan, random: np.random.Generator) -> Page:
    """Draw lines of text over a background until the page or the text ends.

    Raises:
        Fault: no font has the text's characters, or the background does not decode.
    """
    width, height = SHAPES[int(random.integers(len(SHAPES)))]
    picture = _make_background(plan, width, height, random)
    texts = load_texts(plan.texts)
    start = int(random.integers(len(texts)))
    path = _choose_font(plan.fonts, texts[start], random)
    font = ImageFont.truetype(str(path), int(random.integers(plan.sizes[0], plan.sizes[1] + 1)))
    step = font.size * float(random.uniform(1.2, 1.7))
    draw = ImageDraw.Draw(picture)
    left = MARGIN + int(random.integers(0, width // 8))
    top = float(MARGIN)
    lines: list[str] = []
    boxes: list[list[int]] = []
    for line in _wrap_lines(texts, start, path, font, width - MARGIN - left):
        if top + step > height - MARGIN:
            break
        box = [int(edge) for edge in draw.textbbox((left, top), line, font=font)]
        draw.text((left, top), line, font=font, fill=_choose_ink(picture, box, random))
        lines.append(line)
        boxes.append([max(0, box[0]), max(0, box[1]), min(width, box[2]), min(height, box[3])])
        top += step
    if not lines:
        raise Fault("glyphs_missing", f"no line fits in {path.name}: {texts[start][:60]!r}")
    return Page(picture, lines, boxes)


def _wrap_lines(texts: list[str], start: int, path: Path, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    """Lines that fit, of the texts from `start` that the font can write; a word wider than the page is cut."""
    for text in texts[start:]:
        if not _covers(path, text):
            return
        line = ""
        for word in text.split():
            while font.getlength(word) > width:
                size = next((size for size in range(1, len(word)) if font.getlength(word[: size + 1]) > width), 1)
                if line:
                    yield line
                    line = ""
                yield word[:size]
                word = word[size:]
            longer = f"{line} {word}".strip()
            if font.getlength(longer) > width:
                yield line
                line = word
            else:
                line = longer
        if line:
            yield line


def _make_background(plan: Plan, width: int, height: int, random: np.random.Generator) -> Image.Image:
    """A part of a background picture, or soft fields of colour."""
    if not plan.backgrounds:
        coarse = random.integers(0, 256, (int(random.integers(1, 5)), int(random.integers(1, 5)), 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    path = plan.backgrounds[int(random.integers(len(plan.backgrounds)))]
    x, y, scale = random.random(3)
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise Fault("image_bomb", f"{path.name}: {opened.width} x {opened.height}")
            picture = opened.convert("RGB")
    except Fault:
        raise
    except Image.DecompressionBombError as error:
        raise Fault("image_bomb", f"{path.name}: {error}") from None
    except Exception as error:  # noqa: BLE001  (Pillow's decoders raise whatever their parser raises on broken bytes)
        raise Fault("background_broken", f"{path.name}: {error}") from None
    fit = min(picture.width / width, picture.height / height)
    part = (width * fit * (0.5 + scale / 2), height * fit * (0.5 + scale / 2))
    left, top = (picture.width - part[0]) * x, (picture.height - part[1]) * y
    return picture.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + part[0], top + part[1]))


def _choose_ink(picture: Image.Image, box: list[int], random: np.random.Generator) -> tuple[int, ...]:
    """Dark on light, light on dark; a light veil is laid over a background that is neither."""
    region = (max(0, box[0] - 2), max(0, box[1] - 2), min(picture.width, box[2] + 2), min(picture.height, box[3] + 2))
    under = np.asarray(picture.crop(region).convert("L"), dtype=np.float32)
    if under.size and np.quantile(under, 0.95) - np.quantile(under, 0.05) > 90:
        part = picture.crop(region)
        picture.paste(Image.blend(part, Image.new("RGB", part.size, (255, 255, 255)), 0.75), region[:2])
        under = under * 0.25 + 191
    is_light = not under.size or float(under.mean()) > 120
    return tuple(int(value) for value in (random.integers(0, 50, 3) if is_light else random.integers(220, 256, 3)))


def _choose_font(fonts: tuple[Path, ...], text: str, random: np.random.Generator) -> Path:
    order = random.permutation(len(fonts))
    for index in order:
        if _covers(fonts[int(index)], text):
            return fonts[int(index)]
    raise Fault("glyphs_missing", repr(text[:60]))


def _covers(path: Path, text: str) -> bool:
    return _characters(path) >= {ord(character) for character in text}


@lru_cache(maxsize=256)
def _characters(path: Path) -> frozenset[int]:
    return frozenset(FT2Font(str(path)).get_charmap())


@lru_cache(maxsize=1)
def load_texts(paths: tuple[Path, ...]) -> list[str]:
    """The lines of text files, once a process, with single spaces and without control characters.

    Raises:
        CorpusError: not UTF-8, or no line.
    """
    lines: list[str] = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CorpusError(f"{path}: cannot be read as text ({error})") from None
        for line in text.splitlines():
            clean = "".join(" " if unicodedata.category(character)[0] == "C" else character for character in line)
            if clean.strip():
                lines.append(" ".join(clean.split()))
    if not lines:
        raise CorpusError(f"{paths[0]}: no line of text")
    return lines


def list_fonts(folder: Path | None) -> tuple[Path, ...]:
    """The fonts below a folder that can be loaded; without one, those that matplotlib ships for running text.

    Raises:
        CorpusError: none.
    """
    if folder is None:
        shipped = Path(mpl.get_data_path()) / "fonts" / "ttf"
        return tuple(sorted(path for path in shipped.glob("DejaVu*.ttf") if "Display" not in path.name))
    fonts = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf", ".ttc")):
        try:
            _characters(path)
        except (OSError, RuntimeError):
            continue
        fonts.append(path)
    if not fonts:
        raise CorpusError(f"{folder}: no .ttf, .otf or .ttc font that can be loaded")
    return tuple(fonts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glmv-data render-ocr`."""
    parser.description = (
        "Renders pages of text; samples ask for the text or for the box of a line. The extra field `lines` has every line\n"
        "with its box in pixels. Pages whose characters no font has are counted as glyphs_missing: name --fonts for other\n"
        "scripts."
    )
    arguments.add_arguments(parser, with_inputs=False)
    group = parser.add_argument_group("pages")
    group.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 text, drawn line by line")
    group.add_argument("--count", type=int, required=True, help="pages")
    group.add_argument("--fonts", type=Path, metavar="FOLDER", help="fonts (default: DejaVu)")
    group.add_argument("--backgrounds", type=Path, metavar="FOLDER", help="pictures (default: generated)")
    group.add_argument("--locate", type=float, default=0.2, help="share that asks for a line's box (default %(default)s)")
    group.add_argument(
        "--font-size", type=int, nargs=2, default=(14, 36), metavar=("MIN", "MAX"), help="pixels (default 14 36)"
    )
    group.add_argument("--seed", type=int, default=0, help="of every page (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Run the tool and print its report.

    Raises:
        CorpusError: a number out of its range, or a folder without fonts or pictures.
    """
    settings = arguments.read_settings(args)
    low, high = args.font_size
    if args.count < 1 or not 4 <= low <= high <= 200 or not 0 <= args.locate <= 1 or args.seed < 0:
        raise CorpusError("--count at least 1, --font-size from 4 to 200, --locate from 0 to 1, --seed at least 0")
    backgrounds: tuple[Path, ...] = ()
    if args.backgrounds is not None:
        backgrounds = tuple(sorted(path for path in args.backgrounds.rglob("*") if path.suffix.lower() in PICTURES))
        if not backgrounds:
            raise CorpusError(f"{args.backgrounds}: no picture ({', '.join(PICTURES)}) below this folder")
    plan = Plan(tuple(args.text), list_fonts(args.fonts), backgrounds, args.seed, args.locate, (low, high))
    load_texts(plan.texts)
    runs = range(0, args.count, args.chunk)
    chunks = [PageChunk(number, first, min(args.chunk, args.count - first), plan) for number, first in enumerate(runs)]
    arguments.run_chunks(args, Pages(plan), settings, chunks, args.out, {"count": args.count, "chunk": args.chunk})
