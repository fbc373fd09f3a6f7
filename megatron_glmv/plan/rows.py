"""The rows that a plan reckons with: measured from packed data where it is on disk, assumed otherwise.

A shard's table holds tokens and patches of each row, which is what the skew of the vision tower comes from, its trained tokens,
which alone go on behind the decoder's last attention, and sums of the squares of its documents and frames, which is what
attention costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_glmv.config.rl_stage import RlConfig
from megatron_glmv.config.training import StageConfig, TrainConfig
from megatron_glmv.data.index import COLUMNS, INDEX, read_index

SAMPLED_ROWS = 4096
"""Rows of each source that are read for a plan; spread evenly over its shards."""
DOCUMENT_TOKENS = 1024
"""Tokens of a document where nothing is known of them."""
PATCHES_PER_IMAGE = 1024
"""Patches of a picture where nothing is known: 448 x 448 pixels, 256 tokens."""
IMAGE_EVERY_TOKENS = 1024
"""Without data and without --images-per-row, one picture for so many tokens of a row: a quarter of the tokens is visual."""
PROMPT_TOKENS = 512
"""Tokens of a prompt in reinforcement learning."""


@dataclass(frozen=True)
class RowSample:
    """Rows of a stage, as many as stand for all.

    Attributes:
        tokens: [n] useful tokens of each row.
        patches: [n] patches of each row.
        trained: [n] trained tokens of each row.
        document_tokens: of the documents that, all alike, have as many pairs of tokens.
        frame_patches: the same for frames and pairs of patches.
        origin: where the numbers come from, for the report.
    """

    tokens: npt.NDArray[np.float64]
    patches: npt.NDArray[np.float64]
    trained: npt.NDArray[np.float64]
    document_tokens: float
    frame_patches: float
    origin: str

    @property
    def mean_tokens(self) -> float:
        """Useful tokens of a row."""
        return float(self.tokens.mean())

    @property
    def mean_patches(self) -> float:
        """Patches of a row."""
        return float(self.patches.mean())

    @property
    def max_patches(self) -> float:
        """Patches of the row that has most."""
        return float(self.patches.max())

    @property
    def mean_trained(self) -> float:
        """Trained tokens of a row."""
        return float(self.trained.mean())

    @property
    def max_trained(self) -> float:
        """Trained tokens of the row that has most."""
        return float(self.trained.max())

    def draw(self, count: int, seed: int = 0) -> npt.NDArray[np.float64]:
        """[count] patches of rows drawn at random, the same ones for the same seed."""
        if self.patches.min() == self.patches.max():
            return np.full(count, self.patches[0])
        return np.random.default_rng(seed).choice(self.patches, count)


@dataclass(frozen=True)
class RowAssumptions:
    """What the command line says of rows; None: measured, or the defaults above."""

    images_per_row: float | None = None
    patches_per_image: float | None = None
    document_tokens: float | None = None
    trained_share: float | None = None


def sample_rows(
    config: StageConfig, assumed: RowAssumptions, folders: Sequence[Path] = (), answer_tokens: float | None = None
) -> RowSample:
    """Rows for a plan of this stage.

    Args:
        config: the stage; its sources are read where their indexes exist.
        assumed: of the command line; images_per_row replaces what data says.
        folders: packed data sets to read instead of the sources, of equal weight.
        answer_tokens: of an answer in reinforcement learning; None: half of the longest.

    Raises:
        ShardError: a folder that was given and is no packed data set.
    """
    weighed = [(folder, 1.0) for folder in folders]
    missing = 0
    if not folders and isinstance(config, TrainConfig):
        here = [source for source in config.data.sources if (source.path / INDEX).is_file()]
        missing = len(config.data.sources) - len(here)
        weighed = [(source.path, source.weight) for source in here]
    if not weighed or assumed.images_per_row is not None:
        return _assumed(config, assumed, answer_tokens)
    return _measured(weighed, missing, assumed)


def global_rows(config: StageConfig, data: int, answer_tokens: float | None = None) -> int:
    """Rows of one step; in reinforcement learning all rows of an iteration's updates, as many as its answers fill.

    Args:
        config: the stage.
        data: data-parallel size.
        answer_tokens: of an answer in reinforcement learning; None: half of the longest.
    """
    if isinstance(config, TrainConfig):
        return config.global_batch_rows
    assert isinstance(config, RlConfig)
    answers = config.sampling.prompts_per_step * config.sampling.group_size
    length = _answer_tokens(config, answer_tokens)
    unit = data * (config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1)
    rows = math.ceil(answers * (length + PROMPT_TOKENS) / config.sequence_length)
    return max(unit, -(-rows // unit) * unit)


def _answer_tokens(config: RlConfig, answer_tokens: float | None) -> float:
    return answer_tokens or config.max_answer_tokens / 2


def _assumed(config: StageConfig, assumed: RowAssumptions, answer_tokens: float | None) -> RowSample:
    length = config.sequence_length
    each = assumed.patches_per_image or PATCHES_PER_IMAGE
    images = length / IMAGE_EVERY_TOKENS if assumed.images_per_row is None else assumed.images_per_row
    documents = min(float(length), assumed.document_tokens or DOCUMENT_TOKENS)
    share = assumed.trained_share
    if share is None:
        # Without a word, what costs most: every token. Of answers it is known that their prompts are not trained.
        answer = _answer_tokens(config, answer_tokens) if isinstance(config, RlConfig) else None
        share = 1.0 if answer is None else answer / (answer + PROMPT_TOKENS)
    origin = (
        f"assumed: full rows, every one with {images:g} pictures of {each:g} patches and documents of {documents:g} tokens, "
        f"{share:.0%} of them trained (--images-per-row, --patches-per-image, --document-tokens, --trained-share, or "
        "--data FOLDER)"
    )
    full = np.array([float(length)])
    return RowSample(full, np.array([images * each]), share * full, documents, each, origin)


def _measured(weighed: Sequence[tuple[Path, float]], missing: int, assumed: RowAssumptions) -> RowSample:
    total = sum(weight for _, weight in weighed)
    tables = [_sample_table(folder, max(1, round(SAMPLED_ROWS * weight / total))) for folder, weight in weighed]
    table = np.concatenate(tables).astype(float)
    tokens, patches, trained, squared_tokens, squared_patches = (
        table[:, COLUMNS.index(name)] for name in ("tokens", "patches", "trained", "squared_tokens", "squared_patches")
    )
    origin = f"measured: {len(table):,} rows of {len(weighed)} data set{'s' if len(weighed) > 1 else ''}"
    origin += f" ({missing} of the configuration are not here)" if missing else ""
    if assumed.trained_share is not None:
        trained = assumed.trained_share * tokens
        origin += f"; assumed: {assumed.trained_share:.0%} of the tokens trained (--trained-share)"
    return RowSample(
        tokens=tokens,
        patches=patches,
        trained=trained,
        document_tokens=assumed.document_tokens or float(squared_tokens.sum() / max(1.0, tokens.sum())),
        frame_patches=assumed.patches_per_image or float(squared_patches.sum() / patches.sum() if patches.any() else 1.0),
        origin=origin,
    )


def _sample_table(folder: Path, count: int) -> npt.NDArray[np.int64]:
    """[n, columns] of about `count` rows, at even distances over all shards, drawn with replacement where there are fewer."""
    index = read_index(folder)
    wanted = (np.arange(count) * index.num_rows) // count
    ends = np.cumsum([shard.rows for shard in index.shards])
    shards = np.searchsorted(ends, wanted, side="right")
    parts = []
    for shard in np.unique(shards):
        own = np.load(folder / index.shards[shard].index, mmap_mode="r", allow_pickle=False)
        parts.append(own[wanted[shards == shard] - ends[shard] + index.shards[shard].rows])
    return np.concatenate(parts)
