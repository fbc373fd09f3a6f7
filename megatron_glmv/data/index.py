"""The index of a packed data set: what it was packed for, which shards it has, and whether a model and a layout can use it.

Written last, so its presence means that the data set is complete.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from megatron_glmv.config.base import Config, ConfigError, InputError, validate
from megatron_glmv.config.model import ModelShape

FORMAT: Final = "glmv-packed-rows"
VERSION: Final = 3
INDEX = "index.json"
COLUMNS = (
    "offset", "head_bytes", "total_bytes", "head_crc32",
    "tokens", "patches", "trained", "squared_tokens", "squared_patches",
)  # fmt: skip
"""Columns of a shard's rows.npy; the last two are sums of squares over documents and over frames, for costs. The CRC is that of
the contents of the row's JSON, tokens and weights; media have their own in the JSON."""
HEAD_MEMBERS = ("json", "tokens.npy", "weights.npy")
"""What a row's members end in that come before its media."""
REPACK = "pack the data set again with `glmv-data pack`"


class ShardError(InputError):
    """A data set that cannot be read or used; the message is one line that names the file and what to do."""


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class ShardEntry:
    """One shard of a data set, as index.json lists it; there may be hundreds of thousands, so it is small."""

    file: str
    rows: Annotated[int, Field(ge=1)]
    size_bytes: Annotated[int, Field(ge=1)]
    index: str


class IndexTokens(Config):
    """Token ids that packing relied on."""

    image: int
    pad: int


class IndexLimits(Config):
    """Bounds on frames x height x width that packing resized with."""

    min_pixels: int
    max_pixels: int


class PackedIndex(Config):
    """The contents of index.json: what a data set was packed for, and its shards. Written last: its presence means complete."""

    format: Literal["glmv-packed-rows"] = FORMAT
    version: Literal[3] = VERSION
    length: int = Field(ge=8)
    """Tokens of a row, the rounding of documents to `align` included."""
    align: int = Field(ge=1)
    """Document lengths count rounded up to multiples of this."""
    num_rows: int = Field(ge=1)
    num_samples: int = Field(ge=1)
    num_tokens: int = Field(ge=1)
    """Useful tokens: not padding."""
    vocab_size: int = Field(ge=1)
    tokens: IndexTokens
    image_limits: IndexLimits
    patch_size: int = 14
    merge_size: int = 2
    shards: tuple[ShardEntry, ...] = Field(min_length=1)


def join_crc32(contents: Iterable[bytes]) -> int:
    """The CRC-32 of several contents behind each other."""
    return reduce(lambda found, content: zlib.crc32(content, found), contents, 0)


def read_index(folder: Path) -> PackedIndex:
    """Read and validate a data set's index.json.

    Raises:
        ShardError: it is missing, not JSON, of another format or version, or lacks a key.
    """
    path = folder / INDEX
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file, so this is no complete packed data set; {REPACK}") from None
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ShardError(f"{path}: not JSON ({error}); {REPACK}") from None
    found = (tree.get("format"), tree.get("version")) if isinstance(tree, dict) else None
    if found != (FORMAT, VERSION):
        raise ShardError(f"{path}: format and version are {found}, this code reads {(FORMAT, VERSION)}; {REPACK}")
    try:
        return validate(PackedIndex, tree, where=str(path))
    except ConfigError as error:
        raise ShardError(f"{error}; {REPACK}") from None


def write_index(folder: Path, index: PackedIndex) -> None:
    """Write index.json, whole or not at all: it makes the data set complete."""
    partial = folder / (INDEX + ".partial")
    partial.write_text(json.dumps(index.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    partial.rename(folder / INDEX)


def join_indexes(indexes: Sequence[PackedIndex]) -> PackedIndex:
    """The index of a data set whose parts were written one by one into the same folder, with the same settings."""
    counts = {key: sum(getattr(index, key) for index in indexes) for key in ("num_rows", "num_samples", "num_tokens")}
    return indexes[0].model_copy(update=counts | {"shards": tuple(shard for index in indexes for shard in index.shards)})


def check_compatible(index: PackedIndex, where: str, shape: ModelShape, *, sequence_length: int, align: int) -> None:
    """Refuse a data set that was packed for another model or layout, before any rank starts.

    Args:
        index: of the data set.
        where: names the data set in messages.
        shape: the model's numbers.
        sequence_length: tokens of a row in training.
        align: document lengths must be multiples of this, 2 x context for context parallelism.

    Raises:
        ShardError: one line naming the data set, both values and the remedy.
    """
    if index.length > sequence_length:
        raise ShardError(f"{where}: rows of {index.length} tokens do not fit data.sequence_length {sequence_length}; "
                         f"set data.sequence_length to {index.length} or pack with --length {sequence_length}")  # fmt: skip
    if index.align % align:
        raise ShardError(f"{where}: documents were rounded to multiples of {index.align} tokens, this layout needs multiples "
                         f"of {align}; pack again with --align {align} or lower parallel.context")  # fmt: skip
    if index.vocab_size > shape.text.vocab_size:
        raise ShardError(f"{where}: packed with a vocabulary of {index.vocab_size}, the model has {shape.text.vocab_size}; "
                         "pack again with the model's processor")  # fmt: skip
    if shape.vision.temporal_patch_size != 2:
        raise ShardError(f"{where}: rows hold two frames of a video for each patch, the model takes "
                         f"{shape.vision.temporal_patch_size}; only temporal_patch_size 2 can be trained")  # fmt: skip
    pairs = {
        "image token": (index.tokens.image, shape.tokens.image),
        "pad token": (index.tokens.pad, shape.tokens.pad),
        "patch size": (index.patch_size, shape.vision.patch_size),
        "merge size": (index.merge_size, shape.vision.spatial_merge_size),
    }
    for name, (packed, model) in pairs.items():
        if packed != model:
            raise ShardError(f"{where}: packed with {name} {packed}, the model's is {model}; pack with the model's processor")
