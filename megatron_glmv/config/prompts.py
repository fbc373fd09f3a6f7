"""Where the prompts of reinforcement learning come from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_glmv.config.base import Config


class PromptSourceConfig(Config):
    """One file of prompts."""

    path: Path
    """JSONL; a line holds id, messages, domain, answer and, optionally, subcategory, options, pass_rate (docs/rl.md). Paths of
    media are relative to the file."""
    domain: str | None = None
    """Of lines that name none."""


class PromptsConfig(Config):
    """The prompts, and how they are read."""

    sources: tuple[PromptSourceConfig, ...] = Field(min_length=1)
    eval_sources: tuple[PromptSourceConfig, ...] = ()
    """Held-out prompts."""
    processor: Path | None = None
    """Folder with tokenizer, chat template and the limits of pictures and videos; null: that of the first weights."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt, visual tokens included; longer ones are skipped and counted. null: what repack.row_length leaves for the
    longest answer."""
    decode_device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where pictures and videos are decoded; auto takes the GPU where there is one."""
    decode_threads: int = Field(default=2, ge=1)
    """Threads that decode and resize on a rank."""
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """The run stops when more than this share of the lines (and more than 10), or of the prompts drawn, cannot be used."""


class RlEvaluationConfig(Config):
    """Answers to held-out prompts, sampled as in training."""

    every_steps: int = Field(default=0, ge=0)
    """Iterations between evaluations; 0: only before the first and after the last. Needs prompts.eval_sources."""
    prompts: int = Field(default=256, ge=1)
    """Prompts of one evaluation; the same ones each time, dealt evenly over the domains."""
    answers: int = Field(default=1, ge=1)
    """Answers to each; with more than one, pass@k is reported."""
