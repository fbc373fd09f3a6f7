"""How reinforcement learning samples, grades, chooses, weighs and packs answers.

The paper names the parts and few of their numbers. A field whose docstring says "paper" has its value from there; every other
number is not disclosed, and its default is a starting point to be tuned.

Source: arXiv 2507.01006, section 5; clip bounds of DAPO, arXiv 2503.14476, section 3.1.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_glmv.config.base import Config

Share = Annotated[float, Field(ge=0, le=1)]
Proportion = Annotated[float, Field(gt=0)]
ENTROPY_BLOCK = 1024
"""Tokens whose distribution is whole in memory at a time where their entropy is reported and nothing learned from it."""


class SamplingConfig(Config):
    """How answers are sampled."""

    prompts_per_step: int = Field(default=128, ge=1)
    """Groups that one iteration trains on (the paper recommends a large batch; its size is not disclosed)."""
    group_size: int = Field(default=8, ge=2)
    """Answers to each prompt (not disclosed)."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the rollouts (not disclosed). Log-probabilities are of this temperature on the engine's and the trainer's side."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """1 in the paper: smaller values raise garbled output later in the run."""
    max_tokens: int = Field(default=8192, ge=1)
    """Longest answer in tokens without force answering, which has its own budgets (not disclosed)."""


class ForceAnswerConfig(Config):
    """Over-long thinking is closed, so that every rollout gives an answer to score.

    The paper inserts the end-of-think token. That the opening of the answer follows, and both budgets, are of the authors'
    inference script; those of the training are not disclosed.
    """

    enabled: bool = True
    thinking_tokens: int = Field(default=8192, ge=1)
    """Tokens until thinking is closed by force."""
    answer_tokens: int = Field(default=8192, ge=1)
    """Tokens after thinking was closed, by force or by the model."""
    end_of_think: str = Field(default="</think>", min_length=1)
    """Text whose tokens close thinking."""
    answer_open: str = "<answer>"
    """Text inserted after it when thinking is closed by force; may be empty."""


class AlgorithmConfig(Config):
    """Advantages and policy loss: GRPO with asymmetric clipping (paper); neither KL nor entropy term (paper)."""

    divide_by_std: bool = True
    """Divide a group's centred rewards by their standard deviation, as GRPO does (the paper says GRPO and no more)."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """The ratio to the old policy is clipped at 1 - clip_low (not disclosed)."""
    clip_high: float = Field(default=0.28, ge=0)
    """The ratio is clipped at 1 + clip_high; the paper raises it above clip_low, to what is not disclosed."""
    dual_clip: float | None = Field(default=None, gt=1)
    """For a negative advantage, the loss of a token is at most this times its size; null: unbounded (not in the paper)."""
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence to the reference policy; 0 in the paper: penalising it hurts. Above 0 needs a reference."""
    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Weight of an entropy bonus; 0 in the paper: it garbles the output and then collapses."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Multiply a token's loss by min(trainer's / engine's probability, this); null: off (not in the paper)."""
    updates_per_rollout: int = Field(default=1, ge=1)
    """Optimizer updates that the groups of one iteration are divided among (not disclosed)."""


class RepackConfig(Config):
    """Answers packed into rows of fixed length; weights follow samples, so packing cannot change the gradient."""

    row_length: int = Field(default=32_768, ge=8)
    """Tokens of a row; 32K in the paper. The rest of a row is padded."""
    max_patches: int | None = Field(default=None, ge=1)
    """Most patches in a row, for the vision tower's memory; null: no limit (not in the paper)."""


class ExpansionConfig(Config):
    """Dynamic sampling expansion by ratio-EMA (paper); its coefficients are not disclosed."""

    enabled: bool = True
    method: Literal["ema", "waves"] = "ema"
    """ema: one wave of as many prompts as the smoothed ratio asks for (the paper's); waves: one batch after the other until
    enough groups are useful or max_ratio is reached, as DAPO samples (arXiv 2503.14476, section 3.2), to compare with."""
    ema_decay: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old average in the new one (not disclosed)."""
    start_ratio: float = Field(default=1.0, ge=1)
    """Average before the first iteration (not disclosed)."""
    max_ratio: float = Field(default=4.0, ge=1)
    """Largest ratio of one iteration, and of the average; without it, a batch of only useless groups asks for infinitely many
    (not disclosed)."""
    rule: Literal["auto", "correct", "spread"] = "auto"
    """When a group is useful: its answers are neither all right nor all wrong (correct, the paper's), or its rewards spread by
    at least min_spread (spread); auto takes the first where all rewards are 1 or at most 0, else the second."""
    min_spread: float = Field(default=0.05, gt=0)
    """Smallest standard deviation of a useful group of continuous rewards (the paper gives no rule for these)."""
    keep_proportions: bool = True
    """Choose among the groups of each domain apart, by the domains' shares of the wave; otherwise domains with continuous
    rewards, which spread less, lose their places to binary ones (the paper does not say)."""
    fill: Literal["degenerate", "none"] = "degenerate"
    """With too few useful groups: fill the batch with the others, whose gradient is zero, which keeps the weight of a group
    the same in every step; or train on a smaller batch (the paper does not say)."""


TierBounds = tuple[Share, Share, Share, Share]
TierWeights = tuple[Share, Share, Share, Share, Share]


class CurriculumConfig(Config):
    """Which prompts are drawn: tiers by difficulty, weights that move to the middle (paper); no number is disclosed."""

    enabled: bool = True
    """False: every prompt of a sub-category is as likely as any other, and none is dropped; proportions hold."""
    tier_bounds: TierBounds = (0.1, 0.35, 0.65, 0.9)
    """Pass rates between very hard, hard, medium, easy and very easy."""
    start_weights: TierWeights = (0.2, 0.2, 0.2, 0.2, 0.2)
    """Shares of the draws by tier, very hard first, at the first iteration."""
    target_weights: TierWeights = (0.05, 0.25, 0.4, 0.25, 0.05)
    """Shares that they move towards."""
    tier_rate: float = Field(default=0.05, ge=0, le=1)
    """Part of the way to the target that they move in one iteration."""
    offline_answers: float = Field(default=8.0, ge=0)
    """As how many answers the offline pass rate counts before the first visit; it decays with every visit."""
    online_decay: float = Field(default=0.5, ge=0, le=1)
    """What remains of all earlier evidence, the offline label included, when a prompt is visited again."""
    subcategory_focus: float = Field(default=1.0, ge=0)
    """How strongly sub-categories in the middle are preferred: their proportions are multiplied by (4 p (1 - p)) to this power,
    p the running pass rate; 0 keeps the proportions."""
    subcategory_decay: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old running pass rate of a sub-category in the new one, at each iteration."""
    domains: dict[str, Proportion] = Field(default_factory=dict)
    """Proportions of the draws by domain; a domain that is not named has 1. Empty: all equal."""
    subcategories: dict[str, dict[str, Proportion]] = Field(default_factory=dict)
    """Proportions within a domain; one that is not named has 1. A domain without an entry takes its sub-categories by their
    numbers of prompts."""
    drop_trivial_after: int | None = Field(default=3, ge=1)
    """Visits in a row with every answer right after which a prompt is dropped; null: never."""
    drop_unsolvable_after: int | None = Field(default=5, ge=1)
    """Visits in a row with every answer wrong after which a prompt is dropped; null: never."""
    return_after: int | None = Field(default=None, ge=1)
    """Iterations after which a dropped prompt is tried again; null: never."""

    @model_validator(mode="after")
    def _consistent(self) -> CurriculumConfig:
        if any(low >= high for low, high in zip(self.tier_bounds, self.tier_bounds[1:], strict=False)):
            raise ValueError("tier_bounds: must rise")
        for key in ("start_weights", "target_weights"):
            if sum(getattr(self, key)) <= 0:
                raise ValueError(f"{key}: all are zero")
        return self


class GradingConfig(Config):
    """Offline difficulty by pass@k of one or several models (paper); bounds and k are not disclosed."""

    k: int = Field(default=4, ge=1)
    """Of the reported pass@k."""
    tier_bounds: TierBounds = (0.1, 0.35, 0.65, 0.9)
    """Pass rates between very hard, hard, medium, easy and very easy."""
    drop_trivial: bool = True
    """Drop prompts that every answer of every model gets right."""
    drop_unsolvable: bool = True
    """Drop prompts that no answer of any model gets right."""
    min_answers: int = Field(default=4, ge=1)
    """Judged answers without which a prompt is kept and not graded."""
