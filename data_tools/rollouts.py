"""Rollouts files as the inspection page needs them: found, counted line by line, and read again where a group is shown.

Of all groups only their places in the files stay in memory, so a run of any length can be looked at. What the model wrote is
taken as text and nothing else; a line that is not of the form is counted and named.

Source: megatron_glmv/rl/rollout_files.py (the form of a line).
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

FOLDER = "rollouts"
STEP_FILE = re.compile(r"step_(\d{1,15})\.jsonl")
MAX_LINE_BYTES = 256 << 20
MAX_BAD_NAMED = 20
MAX_REASONS = 200
"""Different reasons counted; more are counted together."""


class BadGroup(ValueError):
    """A line that holds no group; the message says why."""


@dataclass(frozen=True)
class SampledAnswer:
    """One answer: what was sampled and what it is worth; reward, correct and advantage are None where it was masked."""

    text: str
    tokens: int
    inserted: int
    finish: str
    reward: float | None
    correct: bool | None
    reason: str
    detail: str
    advantage: float | None


@dataclass(frozen=True)
class SampledGroup:
    """All answers to one prompt of one iteration."""

    step: int
    key: str
    domain: str
    subcategory: str
    tier: str
    question: str
    answer: Any
    media: tuple[str, ...]
    chosen: bool
    answers: tuple[SampledAnswer, ...]

    @property
    def rewards(self) -> list[float]:
        """Of the judged answers."""
        return [answer.reward for answer in self.answers if answer.reward is not None]

    @property
    def num_right(self) -> int:
        """Answers that count as right."""
        return sum(answer.correct is True for answer in self.answers)

    @property
    def kind(self) -> str:
        """`useful` where an advantage is not zero, `degenerate` where all rewards are equal, `unjudged` below two rewards."""
        if len(self.rewards) < 2:
            return "unjudged"
        return "useful" if any(answer.advantage for answer in self.answers) else "degenerate"


def parse_group(data: bytes) -> SampledGroup:
    """Read one line.

    Raises:
        BadGroup: not JSON, or a key that is missing or holds something else.
    """
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        raise BadGroup("not JSON") from None
    if not isinstance(tree, dict):
        raise BadGroup("not a JSON object")
    answers = _get(tree, "answers", list)
    media = _get(tree, "media", list, [])
    texts = {name: _get(tree, name, str, "") for name in ("key", "subcategory", "tier", "question")}
    return SampledGroup(
        step=_get(tree, "step", int),
        domain=_get(tree, "domain", str),
        answer=tree.get("answer"),
        media=tuple(item for item in media if isinstance(item, str)),
        chosen=_get(tree, "chosen", bool, False),
        answers=tuple(map(_parse_answer, answers)),
        **texts,
    )


def _parse_answer(tree: Any) -> SampledAnswer:
    if not isinstance(tree, dict):
        raise BadGroup("an answer is not a JSON object")
    return SampledAnswer(
        text=_get(tree, "text", str),
        tokens=_get(tree, "tokens", int, 0),
        inserted=_get(tree, "inserted", int, 0),
        finish=_get(tree, "finish", str, ""),
        reward=_number(tree, "reward"),
        correct=_get(tree, "correct", bool, None),
        reason=_get(tree, "reason", str, ""),
        detail=_get(tree, "detail", str, ""),
        advantage=_number(tree, "advantage"),
    )


_NEEDED = object()


def _get(tree: dict[str, Any], name: str, kind: type, default: Any = _NEEDED) -> Any:
    value = tree.get(name)
    if value is None and default is not _NEEDED:
        return default
    fits = isinstance(value, kind)
    if kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53
    if not fits:
        raise BadGroup(f"the key {name} holds no {kind.__name__}" if name in tree else f"no key {name}")
    return value


def _number(tree: dict[str, Any], name: str) -> float | None:
    value = tree.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadGroup(f"the key {name} holds no number")
    return float(value)


def find_rollouts(path: Path) -> list[Path]:
    """The rollouts files that a path leads to, in the order of the iterations.

    Args:
        path: a rollouts file, a folder of them, or a run folder.

    Returns:
        Files; none where the path is something else, a packed data set for instance.
    """
    if path.is_file():
        return [path] if path.suffix == ".jsonl" else []
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    steps = {file: found for file in folder.glob("step_*.jsonl") if (found := STEP_FILE.fullmatch(file.name))}
    return sorted(steps, key=lambda file: int(steps[file][1]))


@dataclass
class Totals:
    """Counts over groups; shares are of what they are a share of in the page's table."""

    groups: int = 0
    trained: int = 0
    judged_groups: int = 0
    degenerate: int = 0
    answers: int = 0
    judged: int = 0
    right: int = 0
    forced: int = 0
    cut: int = 0
    tokens: int = 0
    reward: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    by_step: dict[int, list[float]] = field(default_factory=dict)
    """Iteration -> [sum of rewards, judged answers]."""

    def add(self, group: SampledGroup) -> None:
        """Count one group."""
        rewards = group.rewards
        self.groups += 1
        self.trained += group.chosen
        self.judged_groups += group.kind != "unjudged"
        self.degenerate += group.kind == "degenerate"
        self.answers += len(group.answers)
        self.judged += len(rewards)
        self.right += group.num_right
        self.reward += math.fsum(rewards)
        for answer in group.answers:
            self.forced += answer.inserted > 0
            self.cut += answer.finish == "length"
            self.tokens += answer.tokens
            known = answer.reason in self.reasons or len(self.reasons) < MAX_REASONS
            self.reasons[answer.reason if known else "other"] += 1
        step = self.by_step.setdefault(group.step, [0.0, 0.0])
        step[0] += math.fsum(rewards)
        step[1] += len(rewards)


class RolloutFiles:
    """The groups of some files, counted; read one at a time.

    Attributes:
        totals: by domain.
        overall: of all domains.
        bad: lines that hold no group.
        named: the first of them, with file, line and reason.
        steps: iterations met.
    """

    def __init__(self, files: Sequence[Path], steps: Collection[int] = (), domain: str | None = None) -> None:
        """Read every line once.

        Args:
            files: to read.
            steps: iterations to keep; empty: all. A file named after another iteration is not read.
            domain: to keep; None: all.

        Raises:
            ValueError: a file cannot be read, or no group is left.
        """
        self.totals: defaultdict[str, Totals] = defaultdict(Totals)
        self.overall = Totals()
        self.bad = 0
        self.named: list[str] = []
        self.steps: set[int] = set()
        self._files = [file for file in files if not steps or _step_of(file) is None or _step_of(file) in steps]
        self._places = array("Q")
        size = sum(file.stat().st_size for file in self._files)
        with tqdm(total=size, desc="inspect", unit="B", unit_scale=True, disable=None, leave=False) as bar:
            for number, file in enumerate(self._files):
                for offset, line, data in _lines(file):
                    bar.update(len(data))
                    try:
                        group = parse_group(data)
                    except BadGroup as error:
                        self._skip(f"{file}, line {line}: {error}")
                        continue
                    if (steps and group.step not in steps) or (domain is not None and group.domain != domain):
                        continue
                    self._places.extend((number, offset, len(data)))
                    self.totals[group.domain].add(group)
                    self.overall.add(group)
                    self.steps.add(group.step)
        if not self.overall.groups:
            named = ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
            why = f"; {self.bad} lines cannot be read, for instance {self.named[0]}" if self.named else ""
            raise ValueError(f"{named}: no group of rollouts{' that was asked for' if steps or domain else ''}{why}")

    def __len__(self) -> int:
        """Groups."""
        return len(self._places) // 3

    def read(self, number: int) -> SampledGroup:
        """One group, read again.

        Raises:
            ValueError: the file has changed.
        """
        file, offset, size = self._places[3 * number : 3 * number + 3]
        with self._files[file].open("rb") as source:
            source.seek(offset)
            try:
                return parse_group(source.read(size))
            except BadGroup as error:
                raise ValueError(f"{self._files[file]}: has changed while it was read ({error}); run again") from None

    def _skip(self, reason: str) -> None:
        self.bad += 1
        if len(self.named) < MAX_BAD_NAMED:
            self.named.append(reason)


def _step_of(file: Path) -> int | None:
    found = STEP_FILE.fullmatch(file.name)
    return int(found[1]) if found else None


def _lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """(offset, 1-based number, bytes) of every line that is not empty; of a longer one than the bound, its pieces."""
    offset = 0
    with file.open("rb") as source:
        for number, data in enumerate(iter(lambda: source.readline(MAX_LINE_BYTES), b""), 1):
            if data.strip():
                yield offset, number, data
            offset += len(data)
