"""`glmv export --adapter`: the adapters of a checkpoint as a folder that peft loads on the Hugging Face model.

Source: peft 0.21.2, tuners/lora/config.py (the keys of adapter_config.json), utils/save_and_load.py (the names of file and
tensors), tuners/tuners_utils.py, `check_target_module_exists` (a listed name means the modules whose name ends with it).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megatron_glmv.config.linears import adapted_layers
from megatron_glmv.config.lora import LoraConfig
from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.weight_map import MappingError, entry, hf_names
from megatron_glmv.convert.checkpoint_tensors import CheckpointTensors
from megatron_glmv.convert.hf_folder import SINGLE_FILE, HfWeights, write_weights
from megatron_glmv.convert.lora import CheckpointAdapters, checkpoint_lora, hf_adapters
from megatron_glmv.convert.new_folder import new_folder
from megatron_glmv.model.lora import ADAPTER

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterReport:
    """What was written."""

    folder: Path
    num_adapters: int
    num_parameters: int
    dtype: str


def export_adapters(checkpoint_folder: Path, folder: Path, shape: ModelShape) -> AdapterReport:
    """Write the adapters of one complete checkpoint, saved in any layout, as a PEFT folder; needs no process groups.

    Args:
        checkpoint_folder: one complete checkpoint of a run.
        folder: must not exist; it is complete or absent, whatever happens.
        shape: the checkpoint's architecture.

    Raises:
        MappingError: `folder` exists, the checkpoint has no adapters or cannot be read, or the disk is full or refuses.
    """
    lora = checkpoint_lora(checkpoint_folder, shape)
    if lora is None:
        raise MappingError(f"{checkpoint_folder}: has no adapters (model.lora was not set); export it without --adapter")
    adapters = CheckpointAdapters(CheckpointTensors(checkpoint_folder, shape), lora)
    shapes, dtypes = _announce(adapters)
    num_bytes = sum(math.prod(size) * dtypes[name].itemsize for name, size in shapes.items())
    with new_folder(folder, num_bytes) as partial:
        # peft reads one file, whatever its size.
        write_weights(partial, shapes, dtypes, peft_tensors(adapters), max_shard_bytes=sys.maxsize)
        _check_written(HfWeights(partial), adapters)
        (partial / SINGLE_FILE).rename(partial / WEIGHTS_FILE)
        tree = adapter_config(lora, shape, _base_model(checkpoint_folder))
        (partial / CONFIG_FILE).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    dtype = str(next(iter(dtypes.values()))).removeprefix("torch.")
    return AdapterReport(folder, len(shapes) // 2, sum(math.prod(size) for size in shapes.values()), dtype)


def _announce(adapters: CheckpointAdapters) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
    """Shapes and dtypes of the tensors that `peft_tensors` gives, in its order."""
    shape, rank = adapters.stored.shape, adapters.lora.rank
    layers = adapted_layers(adapters.lora, shape)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for module in adapters.plans:
        for name in (name.removesuffix(".weight") for name in entry(f"{module}.weight", shape).hf_names):
            if name in layers:
                sizes = {"lora_A": (rank, layers[name].inputs), "lora_B": (layers[name].outputs, rank)}
                for factor, size in sizes.items():
                    shapes[f"{PREFIX}{name}.{factor}.weight"] = size
                    dtypes[f"{PREFIX}{name}.{factor}.weight"] = adapters.stored.dtype(f"{module}.{ADAPTER}.{factor}")
    return shapes, dtypes


def peft_tensors(adapters: CheckpointAdapters) -> Iterator[tuple[str, Tensor]]:
    """Every adapter of a checkpoint under peft's names: A [rank, inputs] and B [outputs, rank] of each linear layer.

    Raises:
        MappingError: an adapter cannot be read.
    """
    for module in adapters.plans:
        a, b = adapters.read(module)
        for name, (own_a, own_b) in hf_adapters(module, a, b, adapters.lora, adapters.stored.shape).items():
            yield f"{PREFIX}{name}.lora_A.weight", own_a
            yield f"{PREFIX}{name}.lora_B.weight", own_b


def _check_written(written: HfWeights, adapters: CheckpointAdapters) -> None:
    """Read back what was written and compare it to the bit.

    Raises:
        MappingError: a tensor that is another one.
    """
    for name, tensor in peft_tensors(adapters):
        if not torch.equal(written.read(name, 0, len(tensor), None), tensor):
            raise MappingError(f"{written.folder}: {name} is not what the checkpoint holds; the disk returns other bytes")


def adapter_config(lora: LoraConfig, shape: ModelShape, base_model: str | None) -> dict[str, Any]:
    """The tree of adapter_config.json.

    Args:
        lora: what the adapters were trained with.
        shape: the architecture.
        base_model: folder or name of the model that they belong to, if known.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": target_modules(adapted_layers(lora, shape), shape),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def target_modules(adapted: Collection[str], shape: ModelShape) -> list[str]:
    """The shortest endings of names that mean the adapted modules and no other module of the model."""
    modules = {name.rpartition(".")[0] for name in hf_names(shape)}
    chosen: set[str] = set()
    for name in adapted:
        parts = name.split(".")
        endings = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1) if not parts[start].isdigit())
        chosen.add(next(end for end in endings if _named_by(end, modules) <= set(adapted)))
    return sorted(chosen)


def _named_by(ending: str, modules: Collection[str]) -> set[str]:
    return {name for name in modules if name == ending or name.endswith(f".{ending}")}


def _base_model(checkpoint_folder: Path) -> str | None:
    """Where the weights came from that the adapters were trained on, if that was a Hugging Face folder."""
    try:
        tree = yaml.safe_load((checkpoint_folder / "config.yaml").read_text(encoding="utf-8"))
        model, start_from = tree["model"], tree["checkpoint"]["start_from"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        return None
    return model.get("hf_folder") if model.get("load_weights") and start_from is None else None
