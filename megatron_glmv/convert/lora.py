"""Adapters between Megatron's modules and Hugging Face's linear layers, by the rows of the weight map; and merged weights.

An adapter belongs to one Hugging Face layer, a Megatron module may hold several: A has theirs one below the other, B has the
rows of the weight, each of which belongs to one layer. So what the table says of the weight says everything of the adapters.

Source: peft 0.21.2, utils/save_and_load.py (names of the tensors), tuners/lora/layer.py (`get_delta_weight`).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from megatron_glmv.config.base import ConfigError, validate
from megatron_glmv.config.linears import adapted_layers
from megatron_glmv.config.lora import LoraConfig
from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.weight_map import Entry, MappingError, entries, entry
from megatron_glmv.convert.checkpoint_tensors import CheckpointTensors, Stored
from megatron_glmv.convert.mapping import hf_rows
from megatron_glmv.model.lora import ADAPTER, AdapterPlan
from megatron_glmv.run_folder.checkpoint_folder import read_manifest

BLOCK_ELEMENTS = 1 << 24
"""Elements of a weight that are merged at a time: 64 MB in fp32, where the largest weight of the 9B would take 2.5 GB."""


@lru_cache(maxsize=16)
def adapter_plans(lora: LoraConfig, shape: ModelShape) -> dict[str, AdapterPlan]:
    """The adapters of every adapted Megatron module, by the module's name in the whole model.

    Raises:
        ConfigError: a pattern that matches no linear layer.
    """
    plans = {}
    for found in entries(shape).values():
        if sources := _adapted_sources(found, lora, shape):
            number = {source: position for position, source in enumerate(sources)}
            rows = tuple((number.get(s.source), s.stop - s.start) for s in found.segments)
            plans[found.name.removesuffix(".weight")] = AdapterPlan(len(sources), found.shape[1], rows, found.split)
    return plans


def _adapted_sources(found: Entry, lora: LoraConfig, shape: ModelShape) -> list[int]:
    """Which of the Hugging Face weights that a Megatron weight is made of have an adapter."""
    layers = adapted_layers(lora, shape)
    return [source for source, name in enumerate(found.hf_names) if name.removesuffix(".weight") in layers]


def hf_adapters(module: str, a: Tensor, b: Tensor, lora: LoraConfig, shape: ModelShape) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapters (or their gradients) of one Megatron module by Hugging Face layer.

    Args:
        module: its name in the whole model.
        a: [adapters x rank, inputs], unsharded.
        b: [outputs, rank], unsharded, in the weight's order of rows.
        lora: the patterns and the rank.
        shape: the architecture.

    Returns:
        Hugging Face module name -> (A [rank, inputs], B [layer's outputs, rank]), new tensors.

    Raises:
        MappingError: no rule covers the module.
    """
    found = entry(f"{module}.weight", shape)
    parts = hf_rows(found, b)
    return {
        found.hf_names[source].removesuffix(".weight"): (own.clone(), parts[source])
        for source, own in zip(_adapted_sources(found, lora, shape), a.split(lora.rank), strict=True)
    }


class CheckpointAdapters:
    """The adapters of one checkpoint.

    Args:
        stored: the checkpoint.
        lora: the configuration that it was trained with.

    Raises:
        MappingError: the checkpoint's adapters are not exactly those that its configuration names.
    """

    def __init__(self, stored: CheckpointTensors, lora: LoraConfig) -> None:
        self.stored, self.lora = stored, lora
        self.plans = adapter_plans(lora, stored.shape)
        expected = {f"{module}.{ADAPTER}.{name}" for module in self.plans for name in ("lora_A", "lora_B")}
        _check_adapters(stored, expected)

    def read(self, module: str) -> tuple[Tensor, Tensor]:
        """A and B of one adapted Megatron module, unsharded.

        Raises:
            MappingError: they cannot be read, or have another shape than the configuration says.
        """
        plan, rank = self.plans[module], self.lora.rank
        a = self.stored.read_adapter(f"{module}.{ADAPTER}.lora_A", (plan.num_adapters * rank, plan.inputs))
        return a, self.stored.read_adapter(f"{module}.{ADAPTER}.lora_B", (plan.outputs, rank))


class MergedTensors:
    """A checkpoint's weights with its adapters added: W + alpha / rank x B A, in fp32, rounded once to the weight's dtype."""

    def __init__(self, adapters: CheckpointAdapters) -> None:
        self._adapters = adapters
        self._merged: tuple[str, Tensor] | None = None

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a Megatron parameter was saved."""
        return self._adapters.stored.dtype(name)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One unsharded Megatron tensor, or the rows (first, last) of it, merged if it has an adapter.

        Rows are those of the whole tensor, which is kept until another is read: products of other sizes may round otherwise.

        Raises:
            MappingError: it or its adapter cannot be read.
        """
        module = name.removesuffix(".weight")
        if module not in self._adapters.plans:
            return self._adapters.stored.read(name, rows)
        if self._merged is None or self._merged[0] != name:
            self._merged = None
            weight, lora = self._adapters.stored.read(name), self._adapters.lora
            merge(weight, *self._adapters.read(module), self._adapters.plans[module], lora.alpha / lora.rank)
            self._merged = name, weight
        weight = self._merged[1]
        return weight if rows is None else weight[rows[0] : rows[1]]


def merge(weight: Tensor, a: Tensor, b: Tensor, plan: AdapterPlan, scale: float) -> None:
    """Add adapters to an unsharded Megatron weight in place, a block of rows at a time.

    Args:
        weight: [outputs, inputs].
        a: [adapters x rank, inputs].
        b: [outputs, rank].
        plan: which rows belong to which adapter.
        scale: alpha / rank.
    """
    by_adapter = a.float().chunk(plan.num_adapters)
    block, start = max(1, BLOCK_ELEMENTS // plan.inputs), 0
    for adapter, count in plan.rows:
        if adapter is not None:
            for rows in range(start, start + count, block):
                part = slice(rows, min(rows + block, start + count))
                weight[part] = torch.addmm(weight[part].float(), b[part].float(), by_adapter[adapter], alpha=scale)
        start += count


def open_weights(folder: Path, shape: ModelShape) -> Stored:
    """The weights of one checkpoint as a Hugging Face model has them: with its adapters merged, if it has any.

    Raises:
        MappingError: not a checkpoint, or its tensors are not those of its architecture and its adapters.
    """
    stored, lora = CheckpointTensors(folder, shape), checkpoint_lora(folder, shape)
    if lora is None:
        _check_adapters(stored, set())
        return stored
    return MergedTensors(CheckpointAdapters(stored, lora))


def _check_adapters(stored: CheckpointTensors, expected: set[str]) -> None:
    """Refuse a checkpoint with other adapters than its manifest names."""
    if wrong := sorted(stored.adapters ^ expected):
        raise MappingError(
            f"{stored.folder}: {'lacks' if wrong[0] in expected else 'has'} {wrong[0]}, unlike what lora of its meta.json names"
        )


def checkpoint_lora(folder: Path, shape: ModelShape) -> LoraConfig | None:
    """The adapters that a checkpoint's manifest names; None without.

    Raises:
        CheckpointError: the manifest cannot be read.
        MappingError: its patterns match nothing.
    """
    tree = read_manifest(folder).get("lora")
    if tree is None:
        return None
    try:
        lora = validate(LoraConfig, tree, where=str(folder))
        adapted_layers(lora, shape)
    except (ConfigError, TypeError, ValueError) as error:
        raise MappingError(f"{folder}: its manifest names adapters that this architecture cannot have ({error})") from None
    return lora
