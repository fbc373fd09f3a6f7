"""Dynamic sampling expansion by ratio-EMA: how many prompts to roll out so that enough groups are useful, and which to keep.

A group whose answers are all right or all wrong has no gradient. If a share of the last iteration's groups was like that, a
batch needs 1 / (1 - share) times as many prompts; smoothed and capped, that is known before the wave starts, so that all of it
runs in parallel, where sampling until the batch is full would run waves one after the other.

Groups with fewer than two judged answers (a judge that was down, say) say nothing about difficulty: they enter neither the
ratio nor the batch, and are counted.

Source: arXiv 2507.01006, section 5.3.1. Continuous rewards, too few useful groups and the cap are not in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_glmv.config.rl import ExpansionConfig
from megatron_glmv.rl.outcome import Outcome, outcome_of
from megatron_glmv.rl.proportion import apportion
from megatron_glmv.rl.types import Group


@dataclass(frozen=True)
class Selection:
    """Which groups of a wave are trained on.

    Attributes:
        chosen: their indexes, ascending.
        num_useful: useful groups of the wave.
        num_degenerate: groups of the wave that are judged, and not useful.
        num_unjudged: groups with fewer than two judged answers; never chosen.
        num_filled: chosen groups that are not useful, for want of others.
    """

    chosen: tuple[int, ...]
    num_useful: int
    num_degenerate: int
    num_unjudged: int
    num_filled: int


def is_useful(outcome: Outcome, config: ExpansionConfig) -> bool:
    """Whether a group has a gradient by the configured rule."""
    if _counts_right(outcome, config):
        return 0 < outcome.pass_rate < 1
    return outcome.spread >= config.min_spread


def balance(outcome: Outcome, config: ExpansionConfig) -> float:
    """How close a group is to half right, 0 to 1: 4 p (1 - p), or 4 variances, which is the same for rewards of 0 and 1."""
    if _counts_right(outcome, config):
        return 4 * outcome.pass_rate * (1 - outcome.pass_rate)
    return min(1.0, 4 * outcome.spread**2)


def _counts_right(outcome: Outcome, config: ExpansionConfig) -> bool:
    return config.rule == "correct" or (config.rule == "auto" and outcome.is_binary)


class Expansion:
    """The smoothed ratio, and the choice of groups.

    Attributes:
        ratio_ema: prompts to roll out for each one of the batch.
    """

    def __init__(self, config: ExpansionConfig) -> None:
        self._config = config
        self.ratio_ema = min(config.start_ratio, config.max_ratio)

    def num_prompts(self, batch: int) -> int:
        """Prompts of the next wave for a batch of `batch` groups; `batch` itself where expansion is off or in waves."""
        if not self._config.enabled or self._config.method == "waves":
            return batch
        # A ratio of 2 must not ask for 257 of 128 because of rounding.
        return max(batch, math.ceil(batch * self.ratio_ema - 1e-9))

    def wants_more(self, groups: Sequence[Group], num_prompts: int, batch: int) -> bool:
        """Whether another wave follows in this iteration; never with the smoothed ratio.

        Args:
            groups: of all waves of the iteration so far.
            num_prompts: that were rolled out for them.
            batch: useful groups that are wanted.
        """
        if not self._config.enabled or self._config.method != "waves" or num_prompts + batch > self._config.max_ratio * batch:
            return False
        outcomes = [outcome for outcome in map(outcome_of, groups) if outcome.num_judged >= 2]
        return sum(is_useful(outcome, self._config) for outcome in outcomes) < batch

    def update(self, groups: Sequence[Group]) -> float:
        """Take in the groups of one wave, all of them; returns this wave's own ratio (the average, where none was judged)."""
        outcomes = [outcome for outcome in map(outcome_of, groups) if outcome.num_judged >= 2]
        if not outcomes:
            return self.ratio_ema
        useful = sum(is_useful(outcome, self._config) for outcome in outcomes)
        ratio = min(len(outcomes) / useful if useful else math.inf, self._config.max_ratio)
        self.ratio_ema = self._config.ema_decay * self.ratio_ema + (1 - self._config.ema_decay) * ratio
        return ratio

    def select(self, groups: Sequence[Group], batch: int) -> Selection:
        """Choose at most `batch` groups: useful ones first, closest to half right first, earlier ones first.

        Where expansion is off, the first `batch` judged groups are taken as they are.
        """
        outcomes = [outcome_of(group) for group in groups]
        judged = [index for index, outcome in enumerate(outcomes) if outcome.num_judged >= 2]
        useful = {index for index in judged if is_useful(outcomes[index], self._config)}
        ranked = sorted(judged, key=lambda index: (index not in useful, -balance(outcomes[index], self._config), index))
        if not self._config.enabled:
            chosen = judged[:batch]
        else:
            candidates = ranked if self._config.fill == "degenerate" else [index for index in ranked if index in useful]
            chosen = self._by_domain(groups, judged, useful, ranked, batch) if self._config.keep_proportions else []
            taken = set(chosen)
            chosen += [index for index in candidates if index not in taken][: batch - len(chosen)]
        filled = sum(index not in useful for index in chosen)
        return Selection(tuple(sorted(chosen)), len(useful), len(judged) - len(useful), len(groups) - len(judged), filled)

    @staticmethod
    def _by_domain(
        groups: Sequence[Group], judged: Sequence[int], useful: set[int], ranked: Sequence[int], batch: int
    ) -> list[int]:
        """The best useful groups of every domain, up to its share of the batch."""
        if not judged:
            return []
        domain_of = {index: groups[index].prompt.task.domain for index in judged}
        domains = sorted(set(domain_of.values()))
        shares = [sum(domain == name for domain in domain_of.values()) for name in domains]
        places = dict(zip(domains, apportion(min(batch, len(judged)), shares), strict=True))
        chosen = []
        for index in ranked:
            if index in useful and places[domain_of[index]]:
                places[domain_of[index]] -= 1
                chosen.append(index)
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; plain JSON."""
        return {"ratio_ema": self.ratio_ema}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; a lower cap of the configuration holds at once."""
        self.ratio_ema = min(max(1.0, float(state["ratio_ema"])), self._config.max_ratio)
