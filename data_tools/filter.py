"""`glmv-data filter`: the heuristics that a picture and its text must pass, each rejection with its reason code.

Every rule looks at what is in hand already: sizes, the preview of the one decode, the text. Only relevance needs a model, and
any function from pictures and texts to scores can give it.

Source: GLM-4.1V-Thinking (arXiv 2507.01006v6) section 3.1: minimum resolution, solid colour, caption length, CLIP score > 0.3.
The numbers other than 0.3 are not in the paper.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from data_tools.corpus import arguments
from data_tools.corpus.checks import Loaded, Medium
from data_tools.corpus.faults import Dropped
from data_tools.corpus.pipeline import Context
from data_tools.corpus.reader import CorpusError

BATCH = 16
"""Samples that are scored at once."""
NO_TEXT = frozenset({"", "nan", "none", "null", "n/a", "undefined"})
"""What tables without a caption leave in its place."""
REASONS = {
    "image_small": "the shorter side is below --min-side, or the picture has fewer than --min-pixels",
    "image_aspect": "the longer side is more than --max-aspect times the shorter one",
    "image_solid": "the brightest and darkest pixel of every channel differ by less than --min-contrast",
    "text_missing": "the answer is empty or says nan, none or null",
    "text_short": "the answer is shorter than --min-chars or --min-words",
    "text_long": "the answer is longer than --max-chars",
    "text_repeated": "one line or word makes up more than --max-repeat of the answer",
    "image_irrelevant": "the best picture's score against the text is below --min-relevance",
}
"""Reason code -> meaning, in the order in which the rules are asked."""


class Scorer(Protocol):
    """Says how well pictures and texts belong together."""

    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Sequence[float]:
        """One score for each pair, higher for better."""


@dataclass(frozen=True)
class Rules:
    """The limits; sides in pixels, lengths in characters and words."""

    min_side: int = 56
    min_pixels: int = 12_544
    max_aspect: float = 20.0
    min_contrast: int = 8
    min_chars: int = 5
    min_words: int = 0
    max_chars: int = 100_000
    max_repeat: float = 0.6
    min_relevance: float = 0.3

    def judge(self, loaded: Loaded) -> tuple[str, str] | None:
        """The reason and detail of the first rule that a sample breaks, or None."""
        for ref, medium in zip(loaded.record.media, loaded.media, strict=True):
            found = self._judge_medium(medium)
            if found:
                return found[0], f"{ref.name}: {found[1]}"
        return self._judge_text(answer_text(loaded))

    def _judge_medium(self, medium: Medium) -> tuple[str, str] | None:
        short, long = sorted((medium.width, medium.height))
        if short < self.min_side or short * long < self.min_pixels:
            return "image_small", f"{medium.width} x {medium.height}"
        if long > self.max_aspect * short:
            return "image_aspect", f"{medium.width} x {medium.height}"
        if medium.previews:
            extremes = [np.asarray(preview.getextrema()) for preview in medium.previews]
            contrast = max(int((pairs[:, 1] - pairs[:, 0]).max()) for pairs in extremes)
            if contrast < self.min_contrast:
                return "image_solid", f"contrast {contrast}"
        return None

    def _judge_text(self, text: str) -> tuple[str, str] | None:
        if text.strip().lower() in NO_TEXT:
            return "text_missing", repr(text[:40])
        words = text.split()
        if len(text.strip()) < self.min_chars or len(words) < self.min_words:
            return "text_short", f"{len(text.strip())} characters, {len(words)} words"
        if len(text) > self.max_chars:
            return "text_long", f"{len(text)} characters"
        share = max(_repeated_share(words), _repeated_share([line for line in text.splitlines() if line.strip()]))
        if share > self.max_repeat:
            return "text_repeated", f"share {share:.2f}"
        return None


def answer_text(loaded: Loaded) -> str:
    """What the assistant says, turns joined by line breaks."""
    messages = loaded.record.sample.messages
    return "\n".join(item.value for message in messages if message.role == "assistant" for item in message.content)


def _repeated_share(pieces: Sequence[str]) -> float:
    """Share of the commonest piece; 0 for fewer than ten, where it says nothing."""
    if len(pieces) < 10:
        return 0.0
    _, counts = np.unique(np.array(pieces, dtype=object).astype(str), return_counts=True)
    return float(counts.max()) / len(pieces)


@dataclass(frozen=True)
class Filter:
    """The tool: rules, and the name of what makes the scorer.

    Attributes:
        rules: limits.
        scorer: `module:function` that gives a Scorer when called with `folder`; None for no scoring.
        folder: of the scorer's weights.
    """

    rules: Rules
    scorer: str | None = None
    folder: str | None = None
    name: str = "filter"

    def settings(self) -> dict[str, Any]:
        """Rules and scorer."""
        return {"rules": asdict(self.rules), "scorer": self.scorer, "scorer_folder": self.folder and Path(self.folder).name}

    def apply(self, samples: Iterator[Loaded], context: Context) -> Iterator[Loaded | tuple[Loaded, Dropped]]:
        """Samples that pass every rule; with a scorer they carry their score as `relevance`."""
        judged = map(self._judge, samples)
        if self.scorer is None:
            yield from judged
            return
        scorer = load_scorer(self.scorer, self.folder)
        while batch := list(islice(judged, BATCH)):
            scores = self._score(scorer, [result for result in batch if isinstance(result, Loaded) and _can_score(result)])
            for result in batch:
                if isinstance(result, Loaded) and result.position in scores:
                    yield self._decide(result, scores[result.position])
                else:
                    yield result

    def _judge(self, loaded: Loaded) -> Loaded | tuple[Loaded, Dropped]:
        found = self.rules.judge(loaded)
        return loaded if found is None else (loaded, _reject(loaded, *found))

    def _score(self, scorer: Scorer, batch: Sequence[Loaded]) -> dict[int, float]:
        """Position -> the best score of a sample's pictures."""
        pairs = [(loaded, preview) for loaded in batch for medium in loaded.media for preview in medium.previews]
        if not pairs:
            return {}
        scores = scorer([preview for _, preview in pairs], [answer_text(loaded) for loaded, _ in pairs])
        best: dict[int, float] = {}
        for (loaded, _), score in zip(pairs, scores, strict=True):
            best[loaded.position] = max(float(score), best.get(loaded.position, -np.inf))
        return best

    def _decide(self, loaded: Loaded, score: float) -> Loaded | tuple[Loaded, Dropped]:
        if not score >= self.rules.min_relevance:
            return loaded, _reject(loaded, "image_irrelevant", f"score {score:.3f}")
        record = replace(loaded.record, extra=loaded.record.extra | {"relevance": round(score, 4)})
        return replace(loaded, record=record)


def _can_score(loaded: Loaded) -> bool:
    return any(medium.previews for medium in loaded.media)


def _reject(loaded: Loaded, reason: str, detail: str) -> Dropped:
    return Dropped(loaded.record.source, loaded.record.sample.key, reason, detail, is_fault=False)


@lru_cache(maxsize=1)
def load_scorer(name: str, folder: str | None) -> Scorer:
    """A scorer of this process.

    Args:
        name: `module:function`, importable.
        folder: what the function is called with.

    Raises:
        CorpusError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        make: Callable[[str | None], Scorer] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise CorpusError(f"--scorer {name}: {error}; it is module:function, importable from here") from None
    return make(folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glmv-data filter`."""
    codes = "\n".join(f"  {code:18}{meaning}" for code, meaning in REASONS.items())
    parser.description = f"Keeps the samples that pass every rule.\n\nreasons:\n{codes}\n{arguments.HELP}"
    arguments.add_arguments(parser)
    group = parser.add_argument_group("rules")
    for name, default in asdict(Rules()).items():
        group.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help="(default %(default)s)")
    group.add_argument("--clip", type=Path, metavar="FOLDER", help="score relevance with the CLIP model of this folder")
    group.add_argument("--scorer", metavar="MODULE:FUNCTION", help="another scorer: called once, gives scores(pictures, texts)")


def run(args: argparse.Namespace) -> None:
    """Run the tool and print its report.

    Raises:
        CorpusError: a scorer without decoding, two scorers, or a scorer that cannot be loaded.
    """
    rules = Rules(**{name: getattr(args, name) for name in inspect.signature(Rules).parameters})
    if args.clip is not None and args.scorer is not None:
        raise CorpusError("--clip and --scorer: one of them")
    scorer = "data_tools.clip_scorer:load_clip" if args.clip is not None else args.scorer
    if scorer is not None and args.check != "decode":
        raise CorpusError("--check headers: a scorer needs decoded pictures")
    folder = None if args.clip is None else str(args.clip.resolve())
    if scorer is not None:
        load_scorer(scorer, folder)
    arguments.run_over_corpus(args, Filter(rules, scorer, folder))
