"""Prompts in JSONL files: what is asked is known at the start, conversations and media are read when a prompt is drawn.

A line that cannot be used is skipped and counted, with its reason. A prompt is read again wherever it is needed (the rank that
rolls it out, the rank that decodes the pictures of its replica), so pictures never travel between ranks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_glmv.config.base import InputError
from megatron_glmv.config.prompts import PromptSourceConfig
from megatron_glmv.config.rewards import RewardsConfig
from megatron_glmv.data.sample import Sample, SampleError, check_sample
from megatron_glmv.rl.types import Task

TOLERATED = 10
"""Lines that may be bad whatever their share."""


class PromptError(InputError):
    """Prompts that cannot be used; the message names the file and what to do."""


@dataclass(frozen=True)
class _Place:
    path: Path
    offset: int
    size: int


class PromptFiles:
    """Every prompt of some files.

    Attributes:
        tasks: of all usable prompts, in the order of the files.
        offline: pass rates of those that were graded.
        skipped: reasons of lines that cannot be used, with their numbers.
    """

    def __init__(self, sources: Sequence[PromptSourceConfig], rewards: RewardsConfig, *, max_bad_share: float = 0.01) -> None:
        """Read the files.

        Args:
            sources: files; a key that stands in several of them gets the file's name in front.
            rewards: knows the domains.
            max_bad_share: of lines that may be bad.

        Raises:
            PromptError: a file is missing, holds no prompt, or too many lines are bad.
        """
        self.tasks: list[Task] = []
        self.offline: dict[str, float] = {}
        self.skipped: Counter[str] = Counter()
        self._places: dict[str, _Place] = {}
        self._domains = rewards.domains
        self._example = ""
        for source in sources:
            for place, tree in self._lines(source.path):
                self._add(source, place, tree)
        self._check(max_bad_share)

    def sample(self, key: str) -> Sample:
        """The conversation of a prompt, read again from its file.

        Raises:
            PromptError: the file has changed since the start.
        """
        place = self._places[key]
        try:
            with place.path.open("rb") as file:
                file.seek(place.offset)
                tree = json.loads(file.read(place.size))
            return check_sample(tree["messages"], key, place.path.parent, answered=False)
        except (OSError, ValueError, KeyError) as error:
            raise PromptError(f"{place.path}: has changed since the run started ({error}); start it again") from None

    def describe(self) -> str:
        """How many prompts, by domain, and what was skipped, in one line."""
        domains = Counter(task.domain for task in self.tasks)
        named = ", ".join(f"{domain} {count:,}" for domain, count in sorted(domains.items()))
        skipped = ", ".join(f"{reason} {count:,}" for reason, count in self.skipped.most_common())
        return f"{len(self.tasks):,} prompts: {named}" + (f"; skipped: {skipped}" if skipped else "")

    @staticmethod
    def _lines(path: Path) -> Iterator[tuple[_Place, Any]]:
        try:
            with path.open("rb") as file:
                offset = 0
                for line in file:
                    if line.strip():
                        try:
                            tree = json.loads(line)
                        except ValueError:
                            tree = None
                        yield _Place(path, offset, len(line)), tree
                    offset += len(line)
        except OSError as error:
            raise PromptError(f"{path}: cannot be read ({error.strerror}); prompts.sources names JSONL files") from None

    def _add(self, source: PromptSourceConfig, place: _Place, tree: Any) -> None:
        number = len(self._places) + self.skipped.total() + 1
        if not isinstance(tree, dict):
            self._skip(place, number, "not a JSON object")
            return
        key = str(tree.get("id", f"{source.path.name}:{number}"))
        if key in self._places:
            key = f"{source.path.name}:{key}"
        domain = tree.get("domain", source.domain)
        settings = self._domains.get(domain) if isinstance(domain, str) else None
        if not isinstance(domain, str) or settings is None:
            self._skip(place, number, "no such domain" if domain else "no domain")
        elif tree.get("answer") is None and settings.verifier != "general":
            self._skip(place, number, "no answer")
        elif key in self._places:
            self._skip(place, number, "the same id twice")
        else:
            try:
                sample = check_sample(tree.get("messages"), key, place.path.parent, answered=False)
            except SampleError as error:
                self._skip(place, number, error.reason)
                return
            self.tasks.append(_task(sample, domain, tree))
            self._places[key] = place
            if isinstance(rate := tree.get("pass_rate"), int | float) and 0 <= rate <= 1:
                self.offline[key] = float(rate)

    def _skip(self, place: _Place, number: int, reason: str) -> None:
        self.skipped[reason] += 1
        self._example = self._example or f"{place.path}, line {number}: {reason}"

    def _check(self, max_bad_share: float) -> None:
        bad = self.skipped.total()
        if not self.tasks and not bad:
            raise PromptError("prompts.sources: the files hold no prompts")
        if not self.tasks or (bad > TOLERATED and bad > max_bad_share * (bad + len(self.tasks))):
            raise PromptError(
                f"prompts: {bad:,} of {bad + len(self.tasks):,} lines cannot be used, more than prompts.max_bad_share "
                f"{max_bad_share:g}: {self.describe()}; for instance {self._example}"
            )


def _task(sample: Sample, domain: str, tree: dict[str, Any]) -> Task:
    """What judges and verifiers read of a line."""
    question = "\n".join(
        item.value for message in sample.messages if message.role == "user" for item in message.content if item.kind == "text"
    )
    options = tree.get("options")
    return Task(
        key=sample.key,
        domain=domain,
        question=question,
        answer=tree.get("answer"),
        subcategory=str(tree.get("subcategory") or ""),
        options=options if isinstance(options, dict) else {},
        media=tuple(item.value if "://" in item.value else str(sample.folder / item.value) for item in sample.media()),
    )
