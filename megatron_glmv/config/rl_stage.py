"""The root of a stage of reinforcement learning: what every stage has, and where answers and their rewards come from."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from megatron_glmv.config.base import ConfigError
from megatron_glmv.config.engines import EmbeddedConfig, EngineConfig
from megatron_glmv.config.prompts import PromptsConfig, RlEvaluationConfig
from megatron_glmv.config.rewards import RewardsConfig
from megatron_glmv.config.rl import (
    AlgorithmConfig,
    CurriculumConfig,
    ExpansionConfig,
    ForceAnswerConfig,
    RepackConfig,
    SamplingConfig,
)
from megatron_glmv.config.training import StageConfig


class RlConfig(StageConfig):
    """One stage of reinforcement learning with curriculum sampling (RLCS)."""

    prompts: PromptsConfig
    engine: EngineConfig = EmbeddedConfig()
    sampling: SamplingConfig = SamplingConfig()
    force_answer: ForceAnswerConfig = ForceAnswerConfig()
    rewards: RewardsConfig = RewardsConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    expansion: ExpansionConfig = ExpansionConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    repack: RepackConfig = RepackConfig()
    evaluation: RlEvaluationConfig = RlEvaluationConfig()
    rollouts_every_steps: int = Field(default=1, ge=0)
    """Iterations between files of rollouts in run_folder/rollouts, which `glmv-data inspect` shows; 0: none."""

    length_key: ClassVar[str] = "repack.row_length"

    @property
    def sequence_length(self) -> int:
        """Tokens of one packed row."""
        return self.repack.row_length

    @property
    def max_answer_tokens(self) -> int:
        """Longest answer, without the few tokens that force answering inserts."""
        if self.force_answer.enabled:
            return self.force_answer.thinking_tokens + self.force_answer.answer_tokens
        return self.sampling.max_tokens

    @model_validator(mode="after")
    def _has_held_out_prompts(self) -> Self:
        if self.evaluation.every_steps and not self.prompts.eval_sources:
            raise ValueError("evaluation.every_steps: needs prompts.eval_sources")
        return self

    def check(self) -> None:
        """As every stage, and that prompts and answers fit a row.

        Raises:
            ConfigError: one line with the key at fault and what to do.
        """
        super().check()
        if self.max_answer_tokens >= self.repack.row_length:
            keys = "force_answer.thinking_tokens + answer_tokens" if self.force_answer.enabled else "sampling.max_tokens"
            raise ConfigError(
                f"repack.row_length: {self.repack.row_length} tokens hold no prompt beside an answer of "
                f"{self.max_answer_tokens} ({keys}); raise the one or lower the other"
            )
        if self.model.lora is not None and self.algorithm.kl_coefficient:
            raise ConfigError("algorithm.kl_coefficient: a reference policy beside adapters is not kept; set it to 0")
