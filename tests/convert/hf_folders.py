"""Small Hugging Face folders as transformers itself writes them, with a processor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import Glm4vConfig, Glm4vForConditionalGeneration

from tests.data.processor import write_processor
from tests.model import oracle

LAYERS = 6
"""Decoder layers: divisible by two and by three pipeline stages."""


def deep_config() -> dict:
    """The digits preset with `LAYERS` decoder layers."""
    tree = oracle.hf_config("digits")
    tree["text_config"]["num_hidden_layers"] = LAYERS
    return tree


def write_hf_folder(folder: Path, dtype: torch.dtype, *, shard_size: str = "300KB", seed: int = 0) -> Path:
    """A folder with random weights (biases and norms included) in shards, saved by transformers."""
    config = Glm4vConfig(**deep_config())
    config.dtype = dtype
    model = Glm4vForConditionalGeneration._from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(oracle._random_weight(name, torch.randn(weight.shape, generator=generator), 1.0))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    write_processor(folder)
    return folder


def config_of(folder: Path) -> dict:
    """The tree of config.json."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
