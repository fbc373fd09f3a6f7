"""How hard a prompt is, from how many answers of one or several models are right: pass@k, tier, and whether to drop it.

Neither torch nor an engine is needed to grade: the counts come from wherever the answers were sampled.

Source: arXiv 2507.01006, section 5.3 (offline difficulty, tiers); Chen et al., arXiv 2107.03374, section 2.1 (pass@k).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_glmv.config.rl import GradingConfig

TIERS = ("very_hard", "hard", "medium", "easy", "very_easy")
"""In the order of rising pass rates; a tier's number is its place here."""

Verdict = Literal["keep", "trivial", "unsolvable", "unknown"]


@dataclass(frozen=True)
class Grade:
    """The difficulty of one prompt.

    Attributes:
        answers: judged answers of all models.
        pass_rate: mean of the models' shares of right answers, each model counting once; None without enough answers.
        pass_at_k: mean of the models' pass@k; None where no model has k answers.
        tier: one of TIERS; None where pass_rate is.
        verdict: keep; or why the prompt should be dropped; or unknown, which is kept and not graded.
    """

    answers: int
    pass_rate: float | None
    pass_at_k: float | None
    tier: str | None
    verdict: Verdict


def pass_at_k(num_answers: int, num_right: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k answers is right: 1 - C(n - c, k) / C(n, k).

    Args:
        num_answers: n, answers sampled.
        num_right: c, right ones.
        k: at most n.

    Raises:
        ValueError: not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not 0 <= num_right <= num_answers or not 1 <= k <= num_answers:
        raise ValueError(
            f"pass@{k} of {num_right} right answers of {num_answers}: needs 0 <= right <= answers and 1 <= k <= answers"
        )
    wrong = num_answers - num_right
    if wrong < k:
        return 1.0
    missed = 1.0
    for number in range(k):
        missed *= (wrong - number) / (num_answers - number)
    return 1.0 - missed


def tier_of(pass_rate: float, bounds: Sequence[float]) -> int:
    """Number of the tier of a pass rate; a rate on a bound belongs to the easier side."""
    return bisect.bisect_right(bounds, pass_rate)


def grade(counts: Sequence[tuple[int, int]], config: GradingConfig) -> Grade:
    """Grade one prompt.

    Args:
        counts: (judged answers, right answers) of each model; masked answers are in neither.
        config: k, bounds and drop rules.

    Raises:
        ValueError: more right answers than answers.
    """
    counts = [(answers, right) for answers, right in counts if answers]
    if any(not 0 <= right <= answers for answers, right in counts):
        raise ValueError(f"counts {counts}: more right answers than answers")
    answers, right = sum(count[0] for count in counts), sum(count[1] for count in counts)
    estimates = [pass_at_k(*count, config.k) for count in counts if count[0] >= config.k]
    estimate = sum(estimates) / len(estimates) if estimates else None
    if answers < config.min_answers:
        return Grade(answers, None, estimate, None, "unknown")
    rate = sum(count[1] / count[0] for count in counts) / len(counts)
    verdict: Verdict = "keep"
    if right == answers and config.drop_trivial:
        verdict = "trivial"
    elif right == 0 and config.drop_unsolvable:
        verdict = "unsolvable"
    return Grade(answers, rate, estimate, TIERS[tier_of(rate, config.tier_bounds)], verdict)
