"""Where rows come from, in which proportion, and how their pictures and videos are decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_glmv.config.base import Config


class SourceConfig(Config):
    """One data set: a folder of packed shards written by ``glmv-data pack``."""

    name: str = Field(min_length=1)
    """Shown in logs and metrics."""
    path: Path
    """Folder with index.json and the shards."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the rows drawn from this source, relative to the other weights (not in the paper)."""


class DataConfig(Config):
    """The stream of packed rows."""

    sequence_length: int = Field(ge=8)
    """Tokens of one packed row; shorter rows are padded, longer ones are an error."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    eval_sources: tuple[SourceConfig, ...] = ()
    """Held-out rows for the evaluation loss."""
    shuffle: bool = True
    """Permute the rows of every source anew each epoch; false keeps the order of the shards."""
    even_ranks: bool = True
    """Deal the rows of a step to data-parallel ranks so that they cost alike in both towers; false deals them in order."""
    decode_device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where pictures and videos are decoded; auto takes the GPU where there is one."""
    decode_threads: int = Field(default=2, ge=1)
    """Threads that decode and resize on a decoding rank."""
    prefetch_rows: int = Field(default=4, ge=1)
    """Rows decoded ahead of the training step."""
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """The run stops when more than this share of the samples read so far (and more than 10) cannot be decoded."""

    @model_validator(mode="after")
    def _names_differ(self) -> DataConfig:
        for key, sources in (("sources", self.sources), ("eval_sources", self.eval_sources)):
            names = [source.name for source in sources]
            if len(set(names)) != len(names):
                raise ValueError(f"{key}: two sources have the same name")
        return self
