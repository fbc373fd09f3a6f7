"""Counting rewards: by domain, by reason, and when too many answers could not be judged."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from megatron_glmv.config.base import InputError
from megatron_glmv.rl.types import Reward
from megatron_glmv.run_folder.refusal import Outage

_REFUSED = re.compile(r"\bHTTP 40[134]\b")
"""In the detail of a question that its server will not take later either: no token, no right, no such model."""


class TooManyMasked(InputError):
    """More answers could not be judged than the configuration allows."""


class JudgeDown(TooManyMasked, Outage):
    """They could not, because a judge, a reward model or an engine was down; it may not be when the run starts again."""


class Tally:
    """Rewards counted by domain."""

    def __init__(self) -> None:
        self._reasons: dict[str, Counter[str]] = defaultdict(Counter)
        self._values: dict[str, list[float]] = defaultdict(list)
        self._correct: Counter[str] = Counter()
        self._masked: dict[str, Counter[str]] = defaultdict(Counter)
        self._example = ""
        self._num_passing = 0

    def add(self, domain: str, reward: Reward) -> None:
        """Count one answer."""
        if reward.value is None:
            self._masked[domain][reward.reason] += 1
            self._num_passing += _may_pass(reward)
            self._example = reward.detail or self._example
            return
        self._reasons[domain][reward.reason] += 1
        self._values[domain].append(reward.value)
        self._correct[domain] += bool(reward.correct)

    @property
    def num_masked(self) -> int:
        """Answers that could not be judged."""
        return sum(counts.total() for counts in self._masked.values())

    @property
    def num_answers(self) -> int:
        """All answers."""
        return self.num_masked + sum(map(len, self._values.values()))

    def check(self, max_masked_share: float) -> None:
        """Stop where too many are masked.

        Raises:
            TooManyMasked: one line with the share, the reasons and an example.
            JudgeDown: so, too, where without those whose server was down they would not be too many.
        """
        if not self.num_answers or self.num_masked <= max_masked_share * self.num_answers:
            return
        reasons = sum(self._masked.values(), Counter[str]())
        named = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        is_outage = self.num_masked - self._num_passing <= max_masked_share * self.num_answers
        raise (JudgeDown if is_outage else TooManyMasked)(
            f"rewards: {self.num_masked} of {self.num_answers} answers could not be judged, more than "
            f"max_masked_share {max_masked_share:g}: {named}; for instance: {self._example}"
        )

    def metrics(self) -> dict[str, float]:
        """Numbers for a log: of each domain its mean reward and accuracy, and the shares of masked answers and hacks."""
        found = {}
        for domain in self.domains():
            values, masked = self._values[domain], self._masked[domain]
            total = len(values) + masked.total()
            if values:
                found[f"reward/{domain}"] = sum(values) / len(values)
                found[f"accuracy/{domain}"] = self._correct[domain] / len(values)
            found[f"masked/{domain}"] = masked.total() / total
            found[f"hacks/{domain}"] = _hacks(self._reasons[domain]).total() / total
        for reason, count in sum(self._masked.values(), Counter[str]()).items():
            found[f"masked_by/{reason}"] = float(count)
        return found

    def domains(self) -> list[str]:
        """Names of all domains met, in alphabetical order."""
        return sorted(set(self._values) | set(self._masked))

    def lines(self) -> list[str]:
        """The table for people."""
        rows = [("domain", "answers", "reward", "accuracy", "masked", "hacks", "other reasons")]
        for domain in self.domains():
            values, masked, reasons = self._values[domain], self._masked[domain], self._reasons[domain]
            others = {name: count for name, count in reasons.items() if not name.startswith("hack") and name not in _PLAIN}
            rows.append((
                domain,
                f"{len(values) + masked.total():,}",
                f"{sum(values) / len(values):.3f}" if values else "-",
                f"{self._correct[domain] / len(values):.1%}" if values else "-",
                _counts(masked.items()),
                _counts((name.removeprefix("hack: "), count) for name, count in _hacks(reasons).items()),
                _counts(others.items()),
            ))  # fmt: skip
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _may_pass(reward: Reward) -> bool:
    """Whether a masked answer may be judged when the run starts again."""
    is_down = reward.reason in ("judge_down", "reward_model_down", "aborted")
    return is_down and not _REFUSED.search(reward.detail)


_PLAIN = ("right", "wrong", "partial")


def _hacks(reasons: Counter[str]) -> Counter[str]:
    return Counter({name: count for name, count in reasons.items() if name.startswith("hack")})


def _counts(items: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(items)) or "-"
