"""A Hugging Face folder as a checkpoint that training starts from in any layout, a few rows of one tensor at a time.

Neither a model nor a process group nor a GPU is needed, and memory does not grow with the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_glmv.config.model import ModelConfig
from megatron_glmv.config.weight_map import Entry, MappingError, RankPart, check_hf_shapes, rank_segments
from megatron_glmv.convert.hf_folder import HfWeights
from megatron_glmv.convert.new_folder import new_folder
from megatron_glmv.convert.processor import check_processor, copy_processor
from megatron_glmv.convert.tensor_writer import write_tensors
from megatron_glmv.run_folder.checkpoint_folder import FORMAT, MANIFEST, origin

PROCESSOR = "processor"
"""Where an imported checkpoint keeps the files that an export needs again."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What weights may be stored in, by the configuration's names."""


@dataclass(frozen=True)
class ImportReport:
    """What was written."""

    folder: Path
    num_tensors: int
    num_parameters: int
    dtype: str


def import_folder(
    hf_folder: Path,
    checkpoint: Path,
    *,
    check: Callable[[Path], object] | None = None,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> ImportReport:
    """Write the weights of a Hugging Face folder as one complete checkpoint, and keep its processor's files with them.

    Args:
        hf_folder: config.json, safetensors, tokenizer and processor files.
        checkpoint: folder to write; must not exist.
        check: is called with the finished folder before it gets its name; what it raises leaves nothing.
        progress: is told the number of bytes after each piece.

    Raises:
        ConfigError: another model family, or a configuration that cannot be read.
        MappingError: a tensor that no rule covers, is missing, or has another shape or dtype; a shard missing or cut off; a
            tokenizer whose ids are not the architecture's; `checkpoint` exists; the disk is full or refuses.
    """
    config = ModelConfig(hf_folder=hf_folder)
    shape = config.shape
    weights = HfWeights(hf_folder)
    check_hf_shapes(weights.shapes, shape, str(hf_folder))
    dtype = weights_dtype(weights, config.hf_config)
    check_processor(hf_folder, shape)

    def read_rows(found: Entry, start: int, stop: int) -> Tensor:
        pieces = [
            weights.read(found.hf_names[s.source], s.start, s.stop, None).reshape(s.stop - s.start, *found.shape[1:])
            for s in rank_segments(found, RankPart(((start, stop),)))
        ]
        return torch.cat(pieces)

    num_parameters = sum(math.prod(size) for size in weights.shapes.values())
    with new_folder(checkpoint, num_parameters * DTYPES[dtype].itemsize) as partial:
        write_tensors(partial, shape, DTYPES[dtype], read_rows, progress)
        (partial / PROCESSOR).mkdir()
        copy_processor(hf_folder, partial / PROCESSOR, shape)
        manifest = {
            "format": FORMAT,
            "step": 0,
            "layout": None,
            "shape": shape.model_dump(mode="json"),
            "dtype": dtype,
            "imported_from": hf_folder.resolve().name,
            **origin(),
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if check is not None:
            check(partial)
    return ImportReport(checkpoint, len(weights.shapes), num_parameters, dtype)


def weights_dtype(weights: HfWeights, hf_config: dict[str, Any]) -> str:
    """The one dtype of a folder's tensors, by the configuration's name.

    Raises:
        MappingError: tensors of several dtypes, of one that config.json does not say, or of one that is not trained in.
    """
    said = hf_config.get("dtype", hf_config.get("torch_dtype"))
    names = {found: name for name, found in DTYPES.items()}
    first = next(iter(weights.dtypes.values()))
    for name, found in weights.dtypes.items():
        if found not in names or found != first:
            raise MappingError(
                f"{weights.folder}: {name} is {_plain(found)}; every tensor must be {' or every one '.join(map(_plain, names))}"
            )
    if said is not None and said != _plain(first):
        raise MappingError(f"{weights.folder}: config.json says {said} and the tensors are {_plain(first)}; repair one of them")
    return names[first]


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
