"""`glmv-data balance`: resampling that gives every concept of a list its chance: common ones are thinned, rare ones kept whole.

A first pass counts how many samples mention each concept; in the second a sample stays if it stays for one of its concepts, for
each with probability cap / count. The draw is a function of seed, key and concept: no order, part or process changes it.

Source: Xu et al., "Demystifying CLIP Data" (arXiv 2309.16671) section 3 and algorithm 1 (sub-string matching, cap 20,000 for
400 M pairs); GLM-4.1V-Thinking (arXiv 2507.01006v6) section 3.1 resamples in this manner; it gives neither list nor cap.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import ahocorasick
import matplotlib as mpl
import numpy as np
import numpy.typing as npt

from data_tools.corpus import arguments
from data_tools.corpus.checks import Loaded
from data_tools.corpus.faults import Dropped
from data_tools.corpus.job import chunk_path
from data_tools.corpus.media import Record
from data_tools.corpus.pipeline import Context
from data_tools.corpus.reader import CorpusError
from data_tools.dedupe import all_text

mpl.use("Agg")
from matplotlib import pyplot as plt

REASONS = {
    "no_concept": "no concept of the list is mentioned (--unmatched keep lets such samples stay)",
    "concept_common": "the draw of none of its concepts let it stay",
}
SHOWN = 40
"""Concepts in the picture of the histogram; the JSON has all."""


@dataclass(frozen=True)
class Concepts:
    """A list of concepts and the automaton that finds all of them in one pass over a text."""

    names: tuple[str, ...]
    automaton: Any
    whole_words: bool

    def find(self, text: str) -> list[int]:
        """Which concepts a text mentions, each once, ascending."""
        text = fold(text)
        found = set()
        for end, (number, size) in self.automaton.iter(text):
            if not self.whole_words or _stands_alone(text, end - size + 1, end + 1):
                found.add(number)
        return sorted(found)


def fold(text: str) -> str:
    """Compatible characters, lower case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether no letter or digit of a script with spaces continues the match on either side."""
    before = start == 0 or not (_continues(text[start - 1]) and _continues(text[start]))
    return before and (end == len(text) or not (_continues(text[end]) and _continues(text[end - 1])))


def _continues(character: str) -> bool:
    return character.isalnum() and not "\u3040" <= character <= "\ud7af"


@lru_cache(maxsize=1)
def load_concepts(path: Path, match: Literal["word", "substring"]) -> Concepts:
    """Read a list: one concept a line.

    Args:
        path: UTF-8; blank lines and repetitions are passed over.
        match: "word": as a whole word; "substring": anywhere, as MetaCLIP does.

    Raises:
        CorpusError: not readable as text, or no concept.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: cannot be read as a list of concepts ({error})") from None
    names = tuple(dict.fromkeys(name for name in map(fold, lines) if name))
    if not names:
        raise CorpusError(f"{path}: no concept; write one a line")
    automaton = ahocorasick.Automaton()
    for number, name in enumerate(names):
        automaton.add_word(name, (number, len(name)))
    automaton.make_automaton()
    return Concepts(names, automaton, match == "word")


@dataclass(frozen=True)
class Balance:
    """The tool.

    Attributes:
        concepts: file of the list.
        cap: samples of a concept that stay on average; fewer lose none.
        match: how a concept is found in a text.
        unmatched: whether samples without a concept stay.
        seed: of the draws.
    """

    concepts: Path
    cap: int = 20_000
    match: Literal["word", "substring"] = "word"
    unmatched: Literal["keep", "drop"] = "drop"
    seed: int = 0
    name: str = "balance"

    def settings(self) -> dict[str, Any]:
        """The list by its contents, and what the draws depend on."""
        digest = hashlib.sha256(self.concepts.read_bytes()).hexdigest()
        return {"concepts": digest, "cap": self.cap, "match": self.match, "unmatched": self.unmatched, "seed": self.seed}

    @property
    def scan_check(self) -> None:
        """Counting reads texts only."""

    def scan(self, samples: Iterator[Loaded], context: Context) -> None:
        """Save how many samples of a chunk mention each concept."""
        concepts = load_concepts(self.concepts, self.match)
        counts = np.zeros(len(concepts.names), dtype=np.int64)
        for loaded in samples:
            counts[concepts.find(all_text(loaded.record))] += 1
        np.save(chunk_path(context.folder, context.number, "counts.npy"), counts)

    def plan(self, numbers: Sequence[int], scans: Path, folder: Path, excluded: dict[int, list[int]]) -> dict[str, Any]:
        """Add the counts up."""
        counts = sum_counts(scans, numbers, len(load_concepts(self.concepts, self.match).names))
        np.save(folder / "counts.npy", counts)
        return {"concepts_found": int((counts > 0).sum()), "concepts_over_cap": int((counts > self.cap).sum())}

    def apply(self, samples: Iterator[Loaded], context: Context) -> Iterator[Loaded | tuple[Loaded, Dropped]]:
        """Draw for each sample; what stays is counted again."""
        concepts = load_concepts(self.concepts, self.match)
        counts = np.load(context.plan / "counts.npy")
        after = np.zeros(len(counts), dtype=np.int64)
        for loaded in samples:
            record = loaded.record
            found = concepts.find(all_text(record))
            if not found and self.unmatched == "drop":
                yield loaded, Dropped(record.source, record.sample.key, "no_concept", is_fault=False)
            elif found and not any(self._draw(record, concepts.names[number], int(counts[number])) for number in found):
                detail = ", ".join(f"{concepts.names[number]} {counts[number]}" for number in found[:5])
                yield loaded, Dropped(record.source, record.sample.key, "concept_common", detail, is_fault=False)
            else:
                after[found] += 1
                yield loaded
        np.save(chunk_path(context.folder, context.number, "counts.npy"), after)

    def finish(self, numbers: Sequence[int], passes: Path, folder: Path) -> dict[str, Any]:
        """Write the histogram before and after as JSON and as a picture."""
        names = load_concepts(self.concepts, self.match).names
        before = sum_counts(passes / "scan", numbers, len(names))
        after = sum_counts(passes / "write", numbers, len(names))
        order = np.argsort(-before, kind="stable")
        tree = {"cap": self.cap, "concepts": {names[i]: [int(before[i]), int(after[i])] for i in order}}
        text = json.dumps(tree, ensure_ascii=False, indent=1)
        (folder / "histogram.json").write_text(text + "\n", encoding="utf-8")
        draw_histogram(folder / "histogram.png", [names[i] for i in order], before[order], after[order], self.cap)
        return {}

    def _draw(self, record: Record, concept: str, count: int) -> bool:
        if count <= self.cap:
            return True
        text = json.dumps([self.seed, record.sample.key, concept])
        value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64
        return value < self.cap / count


def sum_counts(folder: Path, numbers: Sequence[int], size: int) -> npt.NDArray[np.int64]:
    """The counts of all chunks of a pass."""
    total = np.zeros(size, dtype=np.int64)
    for number in numbers:
        total += np.load(chunk_path(folder, number, "counts.npy"))
    return total


def draw_histogram(path: Path, names: list[str], before: npt.NDArray[np.int64], after: npt.NDArray[np.int64], cap: int) -> None:
    """Left: samples of every concept, by rank; right: those of the commonest by name."""
    figure, (ranks, bars) = plt.subplots(1, 2, figsize=(14, 8), width_ratios=(1, 1))
    try:
        for counts, label in ((before, "before"), (after, "after")):
            ranks.plot(np.arange(1, len(counts) + 1), np.sort(counts)[::-1], label=label)
        ranks.axhline(cap, color="grey", linestyle=":", label=f"cap {cap}")
        ranks.set(xscale="log", yscale="symlog", xlabel="concept, by rank", ylabel="samples", title="all concepts")
        ranks.set_ylim(bottom=0)
        ranks.legend()
        shown = min(SHOWN, len(names))
        places = np.arange(shown)
        bars.barh(places - 0.2, before[:shown], 0.4, label="before")
        bars.barh(places + 0.2, after[:shown], 0.4, label="after")
        bars.set_yticks(places, [name[:30].replace("$", r"\$") for name in names[:shown]], fontsize=7)
        bars.set(xscale="symlog", xlabel="samples", title=f"the {shown} commonest")
        bars.invert_yaxis()
        figure.tight_layout()
        figure.savefig(path, dpi=100, metadata={"Software": None})
    finally:
        plt.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glmv-data balance`."""
    codes = "\n".join(f"  {code:18}{meaning}" for code, meaning in REASONS.items())
    parser.description = (
        "Resamples by the concepts that texts mention; histogram.json and histogram.png show counts before and after.\n\n"
        f"reasons:\n{codes}\n\nTwo passes: with --part, run every part until it says complete, or use --wait.\n{arguments.HELP}"
    )
    arguments.add_arguments(parser)
    group = parser.add_argument_group("concepts")
    group.add_argument("--concepts", type=Path, required=True, metavar="FILE", help="one concept a line")
    group.add_argument(
        "--cap", type=int, default=20_000, help="samples of a concept that stay, on average (default %(default)s)"
    )
    group.add_argument("--match", choices=("word", "substring"), default="word", help="how texts mention (default %(default)s)")
    group.add_argument(
        "--unmatched", choices=("keep", "drop"), default="drop", help="samples without one (default %(default)s)"
    )
    group.add_argument("--seed", type=int, default=0, help="of the draws (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Run the tool and print its report.

    Raises:
        CorpusError: a list that cannot be read, or a cap below one.
    """
    if args.cap < 1:
        raise CorpusError("--cap at least 1")
    load_concepts(args.concepts, args.match)
    arguments.run_over_corpus(args, Balance(args.concepts, args.cap, args.match, args.unmatched, args.seed))
