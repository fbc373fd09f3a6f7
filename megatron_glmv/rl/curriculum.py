"""Which prompts are rolled out: tiers of difficulty whose weights move to the middle, domains and sub-categories in proportion.

A prompt's pass rate starts from its offline label and is merged with every visit; what is older decays. A draw divides the
prompts among domains, their sub-categories, and the tiers within them, and takes from each tier those that were visited least
often: nothing comes twice before all of its tier came once, as far as the weights need no more of a tier than it has.

A draw is a function of (seed, iteration) and of the state, which is a plain tree of numbers; no random generator is carried on.
Prompts that stay all right or all wrong are dropped.

Source: arXiv 2507.01006, section 5.3; the numbers and the rules' details are not disclosed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_glmv.config.base import InputError
from megatron_glmv.config.rl import CurriculumConfig
from megatron_glmv.rl.grading import TIERS, tier_of
from megatron_glmv.rl.outcome import Outcome, outcome_of
from megatron_glmv.rl.proportion import apportion
from megatron_glmv.rl.types import Group, Task

STEADY_SPREAD = 0.05
"""A group of continuous rewards is one more trivial or hopeless visit only if they spread by less than this."""
LEAST_FOCUS = 0.05
"""Smallest value of 4 p (1 - p) of a sub-category, so that none dies out."""
UNKNOWN_TIER = TIERS.index("medium")
"""Tier of prompts that were neither graded nor visited."""


class CurriculumError(InputError):
    """Prompts, labels or a saved state that do not fit each other; the message names the prompt and what to do."""


class Curriculum:
    """Draws prompts, and learns their difficulty from the groups that come back."""

    def __init__(
        self,
        tasks: Sequence[Task],
        config: CurriculumConfig,
        *,
        seed: int,
        offline: Mapping[str, float] | None = None,
    ) -> None:
        """Describe the prompts.

        Args:
            tasks: all of them, with keys that differ.
            config: tiers, weights, proportions and drop rules.
            seed: of the run.
            offline: pass rates from grading, in [0, 1], by key; a prompt without one begins in the medium tier.

        Raises:
            CurriculumError: no prompt, two of one key, a label outside [0, 1], or a proportion of a domain that has no prompt.
        """
        self._config, self._seed = config, seed
        self._keys = [task.key for task in tasks]
        self._place = {key: place for place, key in enumerate(self._keys)}
        if not tasks or len(self._place) != len(tasks):
            raise CurriculumError(
                f"{len(tasks)} prompts with {len(self._place)} different keys; every prompt needs its own key"
            )
        self._cells = sorted({(task.domain, task.subcategory) for task in tasks})
        self._check_proportions()
        number = {cell: place for place, cell in enumerate(self._cells)}
        self._cell_of = np.array([number[task.domain, task.subcategory] for task in tasks])
        self._hashes = np.array([_hash(key) for key in self._keys], dtype=np.uint64)
        size = len(tasks)
        self._visits = np.zeros(size, dtype=np.int64)
        self._right, self._answers = np.zeros(size), np.zeros(size)
        self._streak = np.zeros(size, dtype=np.int64)  # visits in a row that were all right (positive) or all wrong
        self._dropped = np.full(size, -1, dtype=np.int64)  # iteration in which it was dropped, -1: active
        self._cell_rate = np.full(len(self._cells), np.nan)
        for key, rate in (offline or {}).items():
            if not 0 <= rate <= 1:
                raise CurriculumError(f"prompt {key!r}: an offline pass rate of {rate}; it must be between 0 and 1")
            if key in self._place:
                self._answers[self._place[key]] = config.offline_answers
                self._right[self._place[key]] = config.offline_answers * rate
        self._offline = self._right.copy(), self._answers.copy()

    def tier_weights(self, iteration: int) -> npt.NDArray[np.float64]:
        """[5] shares of the draws by tier, very hard first: from start_weights towards target_weights."""
        start, target = (np.array(w) / sum(w) for w in (self._config.start_weights, self._config.target_weights))
        return target + (start - target) * (1 - self._config.tier_rate) ** iteration

    def tiers(self) -> npt.NDArray[np.int64]:
        """[n] tier of every prompt, as numbers of `grading.TIERS`."""
        known = self._answers > 0
        rates = np.divide(self._right, self._answers, out=np.zeros(len(known)), where=known)
        return np.where(known, np.searchsorted(self._config.tier_bounds, rates, side="right"), UNKNOWN_TIER)

    def tier_of(self, key: str) -> str:
        """Name of the tier that a prompt is in now."""
        place = self._place[key]
        rate = self._right[place] / self._answers[place] if self._answers[place] > 0 else None
        return TIERS[UNKNOWN_TIER if rate is None else tier_of(rate, self._config.tier_bounds)]

    def draw(self, iteration: int, count: int) -> list[str]:
        """Keys of the prompts of one iteration, in a random order; counts a visit to each.

        No prompt comes twice, unless `count` is more than all active prompts together.

        Args:
            iteration: counted from 0.
            count: prompts.

        Raises:
            CurriculumError: every prompt was dropped.
        """
        words = np.random.PCG64(np.random.SeedSequence([self._seed, iteration])).random_raw(count + 2 * len(self._cells) + 1)
        self._bring_back(iteration)
        active = self._dropped < 0
        if not active.any():
            raise CurriculumError(
                "every prompt was dropped as trivial or unsolvable; add prompts or raise curriculum.drop_*_after"
            )
        drawn: list[int] = []
        while len(drawn) < count:
            free = active.copy()
            drawn += self._draw_once(free, iteration, min(count - len(drawn), int(active.sum())), words[count:])
        return [self._keys[drawn[place]] for place in np.argsort(words[:count], kind="stable")]

    def observe(self, iteration: int, groups: Iterable[Group]) -> None:
        """Merge what came back: all groups of the wave, kept for training or not; unjudged ones teach nothing.

        Raises:
            CurriculumError: a group of a prompt that is not known.
        """
        config, by_cell = self._config, dict[int, list[float]]()
        for group in groups:
            place = self._place.get(group.prompt.task.key)
            if place is None:
                raise CurriculumError(f"a group of the prompt {group.prompt.task.key!r}, which the curriculum does not know")
            outcome = outcome_of(group)
            if not outcome.num_judged:
                continue
            self._right[place] = config.online_decay * self._right[place] + outcome.num_judged * outcome.pass_rate
            self._answers[place] = config.online_decay * self._answers[place] + outcome.num_judged
            by_cell.setdefault(int(self._cell_of[place]), []).append(outcome.pass_rate)
            self._count_streak(place, iteration, outcome)
        for cell, rates in by_cell.items():
            rate, old = sum(rates) / len(rates), float(self._cell_rate[cell])
            decay = config.subcategory_decay
            self._cell_rate[cell] = rate if np.isnan(old) else decay * old + (1 - decay) * rate

    def report(self) -> dict[str, float]:
        """Active prompts by tier (tier/NAME), dropped ones (dropped/trivial, dropped/unsolvable), least and most visits."""
        active, tiers = self._dropped < 0, self.tiers()
        counts = {f"tier/{name}": float((active & (tiers == tier)).sum()) for tier, name in enumerate(TIERS)}
        visits = self._visits[active] if active.any() else np.zeros(1, dtype=np.int64)
        return counts | {
            "dropped/trivial": float((~active & (self._streak > 0)).sum()),
            "dropped/unsolvable": float((~active & (self._streak < 0)).sum()),
            "visits/least": float(visits.min()),
            "visits/most": float(visits.max()),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides prompts, labels and seed; plain JSON, prompts that were never visited left out."""
        touched = (self._visits > 0) | (self._right != self._offline[0]) | (self._answers != self._offline[1])
        columns = (self._visits, self._right, self._answers, self._streak, self._dropped)
        return {
            "prompts": {self._keys[i]: [column[i].item() for column in columns] for i in np.flatnonzero(touched).tolist()},
            "subcategories": [
                [*cell, rate] for cell, rate in zip(self._cells, self._cell_rate.tolist(), strict=True) if rate == rate
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict` on a curriculum that was made anew; prompts may have been added, but not removed.

        Raises:
            CurriculumError: the state names a prompt or sub-category that is not there.
        """
        cells = {cell: number for number, cell in enumerate(self._cells)}
        missing = [key for key in state["prompts"] if key not in self._place]
        missing += [f"{domain}/{name}" for domain, name, _ in state["subcategories"] if (domain, name) not in cells]
        if missing:
            raise CurriculumError(
                f"the saved curriculum knows {missing[0]!r} and {len(missing) - 1} more that the prompts lack; resume with the "
                "prompts of the saved run"
            )
        columns = (self._visits, self._right, self._answers, self._streak, self._dropped)
        for key, values in state["prompts"].items():
            for column, value in zip(columns, values, strict=True):
                column[self._place[key]] = value
        for domain, name, rate in state["subcategories"]:
            self._cell_rate[cells[domain, name]] = rate

    def _check_proportions(self) -> None:
        domains = {domain for domain, _ in self._cells}
        strangers = [domain for domain in (*self._config.domains, *self._config.subcategories) if domain not in domains]
        strangers += [
            f"{domain}/{name}"
            for domain, names in self._config.subcategories.items()
            for name in names
            if (domain, name) not in self._cells
        ]
        if strangers:
            raise CurriculumError(f"curriculum: a proportion for {strangers[0]!r}, of which there is no prompt; remove it")

    def _bring_back(self, iteration: int) -> None:
        if self._config.return_after is not None:
            due = (self._dropped >= 0) & (iteration - self._dropped >= self._config.return_after)
            self._dropped[due], self._streak[due] = -1, 0

    def _count_streak(self, place: int, iteration: int, outcome: Outcome) -> None:
        """Follow visits in a row without a gradient, and drop a prompt that has had enough of them."""
        if outcome.num_judged < 2:
            return
        steady = outcome.is_binary or outcome.spread < STEADY_SPREAD
        streak = int(self._streak[place])
        if steady and outcome.pass_rate == 1:
            streak = max(streak, 0) + 1
        elif steady and outcome.pass_rate == 0:
            streak = min(streak, 0) - 1
        else:
            streak = 0
        self._streak[place] = streak
        limit = self._config.drop_trivial_after if streak > 0 else self._config.drop_unsolvable_after
        if self._config.enabled and self._dropped[place] < 0 and limit is not None and abs(streak) >= limit:
            self._dropped[place] = iteration

    def _draw_once(self, free: npt.NDArray[np.bool_], iteration: int, count: int, words: npt.NDArray[np.uint64]) -> list[int]:
        """Take `count` different prompts of the free ones, whose marks go."""
        offsets = iter((words >> np.uint64(11)) * 2.0**-53)
        weights = self.tier_weights(iteration) if self._config.enabled else np.ones(len(TIERS))
        tiers = self.tiers() if self._config.enabled else np.full(len(free), UNKNOWN_TIER)
        order = np.lexsort((self._priorities(), self._visits))
        order = order[free[order]]
        cells, tier_at = self._cell_of[order], tiers[order]
        present = sorted(set(cells.tolist()))
        domains = sorted({self._cells[cell][0] for cell in present})
        shares = [self._config.domains.get(domain, 1.0) for domain in domains]
        drawn: list[int] = []

        def take(candidates: npt.NDArray[np.int64], wanted: int) -> int:
            """Take the first free ones; returns how many are still wanted."""
            chosen = candidates[free[candidates]][:wanted]
            free[chosen] = False
            drawn.extend(chosen.tolist())
            return wanted - len(chosen)

        def by_weight(chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
            return order[chosen][np.argsort(-weights[tier_at[chosen]], kind="stable")]

        for domain, domain_count in zip(domains, apportion(count, shares, next(offsets)), strict=True):
            own = [cell for cell in present if self._cells[cell][0] == domain]
            in_cells = [cells == cell for cell in own]
            parts = apportion(domain_count, self._cell_weights(own, in_cells), next(offsets))
            missing = 0
            for in_cell, part in zip(in_cells, parts, strict=True):
                pools = [in_cell & (tier_at == tier) for tier in range(len(TIERS))]
                chances = [float(weight) * bool(pool.any()) for weight, pool in zip(weights, pools, strict=True)]
                if not any(chances):
                    chances = [float(pool.sum()) for pool in pools]
                wanted = apportion(part, chances, next(offsets))
                left = sum(take(order[pool], size) for pool, size in zip(pools, wanted, strict=True))
                missing += take(by_weight(in_cell), left)
            take(by_weight(np.isin(cells, own)), missing)
        take(by_weight(np.ones(len(order), dtype=np.bool_)), count - len(drawn))
        self._visits[drawn] += 1
        return drawn

    def _cell_weights(self, cells: Sequence[int], members: Sequence[npt.NDArray[np.bool_]]) -> list[float]:
        """Proportions of a domain's sub-categories, those in the middle preferred."""
        named = self._config.subcategories.get(self._cells[cells[0]][0])
        weights = []
        for cell, chosen in zip(cells, members, strict=True):
            weight = float(chosen.sum()) if named is None else named.get(self._cells[cell][1], 1.0)
            rate = float(self._cell_rate[cell])
            if self._config.enabled and rate == rate:
                weight *= max(4 * rate * (1 - rate), LEAST_FOCUS) ** self._config.subcategory_focus
            weights.append(weight)
        return weights

    def _priorities(self) -> npt.NDArray[np.uint64]:
        """[n] order of prompts of equal visits: a new permutation for every visit, the same in every process."""
        round_words = np.random.PCG64(np.random.SeedSequence(self._seed)).random_raw(1)
        return _scramble(_scramble(self._hashes ^ round_words[0]) + self._visits.astype(np.uint64))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _scramble(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), on arrays."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)
