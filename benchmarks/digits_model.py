"""What the benchmarks of training on a CPU share: three sizes of the quickstart's model, its rows, and a run on one of them.

The larger sizes keep the proportions of GLM-4.1V-9B, whose decoder does nine tenths of the work: a ViT of three eighths of the
decoder's width and six tenths of its depth, and MLPs of ten thirds of the width.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from megatron_glmv.config.base import validate
from megatron_glmv.config.model import PRESETS, ModelConfig
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.data.index import INDEX

LENGTH = 1024
SAMPLES, FEW_SAMPLES = 6000, 400
"""Of the data set, about 37 a row, and of the one for a quick trial."""


class Size(NamedTuple):
    """Numbers of a model that differ from the preset's."""

    width: int
    ffn: int
    layers: int
    heads: int
    vision_width: int
    vision_layers: int


SIZES: dict[str, Size | None] = {
    "1m": None,
    "10m": Size(width=256, ffn=1024, layers=8, heads=4, vision_width=96, vision_layers=5),
    "100m": Size(width=768, ffn=2560, layers=12, heads=12, vision_width=288, vision_layers=7),
}
"""1m is the preset digits, 1.1 M parameters; 10m has 9.4 M, 100m 102.6 M."""


def hf_config(size: Size) -> dict[str, Any]:
    """The Hugging Face configuration tree of a size, at the vocabulary of the preset."""
    tree = copy.deepcopy(ModelConfig(preset="digits").hf_config)
    tree["text_config"].update(
        hidden_size=size.width, intermediate_size=size.ffn, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=2, head_dim=size.width // size.heads,
    )  # fmt: skip
    tree["text_config"]["rope_parameters"]["mrope_section"] = [4, 6, 6]
    tree["vision_config"].update(
        depth=size.vision_layers, hidden_size=size.vision_width, num_heads=4, out_hidden_size=size.width,
        intermediate_size=size.ffn,
    )  # fmt: skip
    return tree


def config_folder(name: str, folder: Path) -> Path:
    """A folder with the config.json of a size, as transformers and model.hf_folder read it."""
    size = SIZES[name]
    out = folder / f"model-{name}"
    out.mkdir(parents=True, exist_ok=True)
    text = (PRESETS / "digits.json").read_text(encoding="utf-8") if size is None else json.dumps(hf_config(size), indent=1)
    partial = out / f"config.{os.getpid()}.json"
    partial.write_text(text, encoding="utf-8")
    partial.replace(out / "config.json")  # whole at every moment: the processes of a comparison all write it
    return out


def write_rows(folder: Path, *, few: bool) -> Path:
    """The packed rows of the quickstart's commands, written once."""
    folder = folder / ("few" if few else "rows")
    rows, raw, processor = folder / "train", folder / "raw", folder / "processor"
    if (rows / INDEX).is_file():
        return rows
    for words in (
        ("digits", raw, "--train", str(FEW_SAMPLES if few else SAMPLES), "--eval", "8"),
        ("train-tokenizer", processor, "--input", raw / "train.jsonl", "--min-pixels", "1568"),
        ("pack", raw / "train.jsonl", rows, "--processor", processor, "--length", str(LENGTH), "--align", "2"),
    ):
        subprocess.run([sys.executable, "-m", "data_tools", *map(str, words)], check=True, capture_output=True)
    return rows


def run_config(name: str, folder: Path, rows: Path, global_batch_rows: int, **parallel: Any) -> TrainConfig:
    """The quickstart's configuration for one of the sizes, in another layout, at a constant learning rate."""
    own = config_folder(name, folder)
    return validate(TrainConfig, {
        "run_folder": str(folder / "run"), "steps": 1_000_000, "global_batch_rows": global_batch_rows,
        "model": {"hf_folder": str(own), "load_weights": False, "init_std": 0.08 if name == "1m" else 0.03},
        "parallel": {"overlap": False, **parallel},
        "precision": {"dtype": "fp32", "layers": "torch"},
        "data": {"sequence_length": LENGTH, "decode_threads": 1, "sources": [{"name": "digits", "path": str(rows)}]},
        "optimizer": {"lr": 1e-4, "schedule": "constant", "weight_decay": 0.05},
    })  # fmt: skip
