"""The policy's loss of each token: the clipped surrogate, and what one wants to watch of it.

A token weighs 1 / (trained tokens of its answer), and the schedule divides the sum by the answers of the global batch: the mean
over an answer's tokens, then the mean over answers, whatever rows, micro-steps and ranks they were dealt to. To count an answer
exactly once where context ranks share its row, the rank that holds its last trained token counts it. Prompt tokens and inserted
tokens have weight 0; nothing of them, not even a value that is not finite, reaches loss, gradient or metrics.

Shapes: S tokens of this context rank, in its order, aligned to labels: entry t is about predicting the token after t.

Source: arXiv 2507.01006, section 5.3 (no KL, no entropy term, raised upper clip, mean per answer); Ye et al., arXiv 1912.09729,
section 4.4 (dual clip); http://joschu.net/blog/kl-approx.html (k3 estimate of KL).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_glmv.config.rl import AlgorithmConfig
from megatron_glmv.sequence.transfer import to_device

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut to this size before exp; any clipping has long set in, and float32 does not overflow."""

SUMS = (
    "tokens",  # trained tokens
    "answers",
    "loss",  # sum over answers of the mean of their tokens' losses
    "advantage",  # of tokens
    "ratio",
    "clipped_low",  # tokens whose gradient the lower bound cut off
    "clipped_high",
    "clipped_dual",
    "kl_old",  # k3 estimate of the divergence from the old policy
    "kl_reference",
    "entropy",
    "gap",  # absolute difference of the trainer's and the engine's log-probabilities
    "importance_capped",  # tokens whose importance ratio was cut to its cap
)
"""What `PolicyStats.sums` holds, in this order; the histogram of gaps follows."""
MAXIMA = ("ratio", "gap")
"""What `PolicyStats.maxima` holds."""
GAP_BINS_PER_DECADE, GAP_DECADES = 10, (-7, 2)
GAP_BINS = GAP_BINS_PER_DECADE * (GAP_DECADES[1] - GAP_DECADES[0]) + 1
"""Bins of the histogram of gaps: the first ends at 1e-7 nats, others are a tenth of a decade wide, the last holds all above."""


@dataclass(frozen=True)
class PolicyTerms:
    """What the loss reads of one row besides the current policy. All tensors have one shape, [S] or [1, S].

    Attributes:
        advantages: float32.
        old_logprobs: float32, of the policy that the ratio is taken to, as the trainer computes them.
        engine_logprobs: float32, as the engine sampled.
        ends: bool, at the last trained token of each answer.
        reference_logprobs: float32, or None without a KL term.
    """

    advantages: Tensor
    old_logprobs: Tensor
    engine_logprobs: Tensor
    ends: Tensor
    reference_logprobs: Tensor | None = None

    def at(self, index: Tensor, device: torch.device = torch.device("cpu")) -> PolicyTerms:  # noqa: B008  (a value)
        """The part of a context rank: [1, len(index)] tensors on `device`; index is `ModelInputs.label_index`."""
        tensors = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        own = {name: tensor.reshape(-1)[index].unsqueeze(0) for name, tensor in tensors.items()}
        return PolicyTerms(**{name: to_device(tensor, torch.device(device)) for name, tensor in own.items()})

    def with_old(self, old_logprobs: Tensor) -> PolicyTerms:
        """The same with other old log-probabilities."""
        return replace(self, old_logprobs=old_logprobs)


@dataclass(frozen=True)
class PolicyStats:
    """Sums and maxima over trained tokens; parts of a batch are merged, and over ranks one adds sums and takes maxima.

    Attributes:
        sums: [len(SUMS) + GAP_BINS] float64.
        maxima: [len(MAXIMA)] float64, 0 where there is no token.
    """

    sums: Tensor
    maxima: Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of one row.

    Attributes:
        losses: [1, S] weighted loss of each token, with gradient; exactly 0 where nothing is trained.
        num_answers: int32 scalar, answers that end here; the schedule divides by their sum over the global batch.
        stats: for the report.
    """

    losses: Tensor
    num_answers: Tensor
    stats: PolicyStats


def policy_loss(
    logprobs: Tensor, weights: Tensor, terms: PolicyTerms, config: AlgorithmConfig, entropy: Tensor | None = None
) -> PolicyLoss:
    """Weighted loss of every token of a row.

    Args:
        logprobs: [1, S] of the labels under the current policy at the sampling temperature.
        weights: [1, S] float32, `ModelInputs.loss_weights`: 1 / (trained tokens of the answer), 0 where nothing is trained.
        terms: of the same tokens.
        config: clip bounds and optional terms.
        entropy: [1, S] of the current policy, with gradient where the entropy term is on; else None or detached.

    Raises:
        ValueError: a KL or entropy term is on, and what it needs is not given.
    """
    if config.kl_coefficient and terms.reference_logprobs is None:
        raise ValueError("kl_coefficient is above 0, but there are no log-probabilities of a reference policy")
    if config.entropy_coefficient and entropy is None:
        raise ValueError("entropy_coefficient is above 0, but the entropy is not given")
    trained = weights > 0
    zero = torch.zeros_like(logprobs)
    # Selected before anything is computed, so that what stands at other tokens cannot make 0 x inf.
    log_ratio = torch.where(trained, logprobs - terms.old_logprobs, zero).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    advantages = torch.where(trained, terms.advantages, zero)
    losses, clips = _surrogate(ratio, advantages, config)
    gap = torch.where(trained, terms.old_logprobs - terms.engine_logprobs, zero).detach()
    capped = torch.zeros_like(trained)
    if config.importance_cap is not None:
        importance = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        capped = trained & (importance > config.importance_cap)
        losses = losses * importance.clamp(max=config.importance_cap)
    kl_reference = zero
    if terms.reference_logprobs is not None:
        kl_reference = k3(torch.where(trained, terms.reference_logprobs - logprobs, zero))
        if config.kl_coefficient:
            losses = losses + config.kl_coefficient * kl_reference
    entropy = zero if entropy is None else torch.where(trained, entropy, zero)
    if config.entropy_coefficient:
        losses = losses - config.entropy_coefficient * entropy
    losses = losses * weights
    num_answers = (terms.ends & trained).sum().to(torch.int32)
    columns = {
        "tokens": trained,
        "answers": terms.ends & trained,
        "loss": losses,
        "advantage": advantages,
        "ratio": torch.where(trained, ratio, zero),
        **clips,
        "kl_old": k3(-log_ratio),
        "kl_reference": kl_reference,
        "entropy": entropy,
        "gap": gap.abs(),
        "importance_capped": capped,
    }
    return PolicyLoss(losses, num_answers, _measure(columns, trained))


def k3(log_ratio: Tensor) -> Tensor:
    """Estimate of KL(p || q) from log q - log p of a token sampled from p: unbiased, and never negative."""
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp() - log_ratio - 1


def _surrogate(ratio: Tensor, advantages: Tensor, config: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped loss, and where each bound holds it."""
    free = -advantages * ratio
    held = -advantages * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    losses = torch.maximum(free, held)
    is_held = held > free
    dual = torch.zeros_like(is_held)
    if config.dual_clip is not None:
        ceiling = -advantages * config.dual_clip
        dual = (advantages < 0) & (losses > ceiling)
        losses = torch.where(dual, ceiling, losses)
    return losses, {
        "clipped_low": is_held & (advantages < 0),
        "clipped_high": is_held & (advantages > 0),
        "clipped_dual": dual,
    }


@torch.no_grad()
def _measure(columns: dict[str, Tensor], trained: Tensor) -> PolicyStats:
    sums = torch.stack([columns[name].detach().double().sum() for name in SUMS])
    exponent = torch.log10(columns["gap"].double().flatten().clamp(min=10.0 ** (GAP_DECADES[0] - 1)))
    bins = ((exponent - GAP_DECADES[0]) * GAP_BINS_PER_DECADE).ceil().nan_to_num(GAP_BINS).clamp(0, GAP_BINS - 1)
    histogram = torch.bincount(bins.long(), weights=trained.flatten().double(), minlength=GAP_BINS)
    maxima = torch.stack([columns[name].detach().double().amax() for name in MAXIMA])
    return PolicyStats(torch.cat((sums, histogram)), maxima)


def merge_stats(parts: Sequence[PolicyStats], device: torch.device | str = "cpu") -> PolicyStats:
    """Several rows' statistics as one; of no row, zeros on `device`, so that a rank without rows can join a reduction."""
    if not parts:
        zeros = torch.zeros(len(SUMS) + GAP_BINS + len(MAXIMA), dtype=torch.float64, device=device)
        return PolicyStats(zeros[: -len(MAXIMA)], zeros[-len(MAXIMA) :])
    return PolicyStats(torch.stack([part.sums for part in parts]).sum(0), torch.stack([part.maxima for part in parts]).amax(0))


def summarize(stats: PolicyStats) -> dict[str, float]:
    """What is reported of a whole batch.

    Returns:
        tokens and answers; loss, the mean over answers of their tokens' means; shares and means over tokens (clip_share_low,
        clip_share_high, clip_share_dual, importance_capped_share, advantage_mean, ratio_mean, kl_old, kl_reference, entropy,
        gap_mean); ratio_max, gap_max; gap_p99, the upper edge of the histogram's bin in which the 99th percentile lies.
        Log-probabilities and their differences are in nats.
    """
    sums = dict(zip(SUMS, stats.sums[: len(SUMS)].tolist(), strict=True))
    maxima = dict(zip(MAXIMA, stats.maxima.tolist(), strict=True))
    tokens = max(sums["tokens"], 1)
    return {
        "tokens": sums["tokens"],
        "answers": sums["answers"],
        "loss": sums["loss"] / max(sums["answers"], 1),
        "advantage_mean": sums["advantage"] / tokens,
        "ratio_mean": sums["ratio"] / tokens,
        "ratio_max": maxima["ratio"],
        "clip_share_low": sums["clipped_low"] / tokens,
        "clip_share_high": sums["clipped_high"] / tokens,
        "clip_share_dual": sums["clipped_dual"] / tokens,
        "kl_old": sums["kl_old"] / tokens,
        "kl_reference": sums["kl_reference"] / tokens,
        "entropy": sums["entropy"] / tokens,
        "gap_mean": sums["gap"] / tokens,
        "gap_max": maxima["gap"],
        "gap_p99": _percentile(stats.sums[len(SUMS) :], maxima["gap"]),
        "importance_capped_share": sums["importance_capped"] / tokens,
    }


def _percentile(histogram: Tensor, largest: float, share: float = 0.99) -> float:
    """Upper edge of the bin that holds this share of the tokens, but not above the largest gap there was."""
    if not histogram.sum():
        return 0.0
    place = int((histogram.cumsum(0) < share * histogram.sum()).sum())
    if place == GAP_BINS - 1:
        return largest
    return min(10.0 ** (GAP_DECADES[0] + place / GAP_BINS_PER_DECADE), largest)
