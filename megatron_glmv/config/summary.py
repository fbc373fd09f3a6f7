"""What a training configuration amounts to: parameters, tokens, ranks, and what deserves a second look.

Everything here is arithmetic on the configuration; it is what ``glmv check`` prints below the resolved tree.
"""

from __future__ import annotations

import math

from megatron_glmv.config.base import ConfigError
from megatron_glmv.config.count import count_parameters
from megatron_glmv.config.data import SourceConfig
from megatron_glmv.config.linears import adapted_layers, count_adapters, linear_layers
from megatron_glmv.config.training import TrainConfig

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def summarize(config: TrainConfig) -> str:
    """A short readable account of `config`, one fact a line.

    Raises:
        ConfigError: the model's numbers cannot be read.
    """
    count = count_parameters(config.model.shape)
    frozen = config.model.freeze
    parts = [("vision", count.vision), ("merger", count.merger), ("text", count.text), ("head", count.head)]
    rows = config.global_batch_rows
    tokens = rows * config.data.sequence_length
    layout = config.parallel
    lines = ["parameters"]
    for name, number in parts:
        part = "text" if name == "head" else name
        lines.append(f"  {name:<10}{number:>18,}{'  frozen' if part in frozen or config.model.lora else ''}")
    lines += [
        f"  {'total':<10}{count.total:>18,}",
        *_adapters(config, count.total),
        f"weights       {_start(config)}",
        f"step          {rows:,} rows x {config.data.sequence_length:,} tokens = {tokens:,} tokens",
        f"stage         {config.steps:,} steps = {config.steps * tokens:,} tokens ({short(config.steps * tokens)})",
        f"one replica   {layout.model_ranks} ranks: tensor {layout.tensor} x pipeline {layout.pipeline}"
        + (f" (virtual {layout.virtual_pipeline})" if layout.virtual_pipeline > 1 else "")
        + f" x context {layout.context}",
        f"data parallel {_data_sizes(config)}",
        f"precision     {_precision(config)}",
    ]
    return "\n".join(lines + [f"warning: {text}" for text in warnings(config)])


def _adapters(config: TrainConfig, total: int) -> list[str]:
    """What learns with LoRA, by part of the model."""
    lora, shape = config.model.lora, config.model.shape
    if lora is None:
        return []
    count, layers = count_adapters(lora, shape), adapted_layers(lora, shape)
    learning = sum(count.values())
    parts = ", ".join(f"{part} {number:,}" for part, number in count.items() if number)
    return [
        f"  {'adapters':<10}{learning:>18,}  learn, {learning / total:.2%} of the model: {parts}",
        f"lora          rank {lora.rank}, alpha {lora.alpha:g} on {len(layers)} of {len(linear_layers(shape))} linear layers",
    ]


def short(number: float) -> str:
    """A count with three significant digits and a unit: 1.51 T."""
    for size, unit in _UNITS:
        if number >= size:
            value = number / size
            return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {unit}"
    return str(number)


def data_parallel_sizes(config: TrainConfig) -> list[int]:
    """Every data-parallel size that the batch can be dealt to, smallest first."""
    sizes = []
    for size in range(1, config.global_batch_rows + 1):
        if config.global_batch_rows % size == 0:
            try:
                config.data_parallel(size * config.parallel.model_ranks)
            except ConfigError:  # the interleaved schedule needs more rows a replica
                continue
            sizes.append(size)
    return sizes


def warnings(config: TrainConfig) -> list[str]:
    """What is allowed, but probably not meant; one line each, the key first."""
    found = []
    for key, sources in (("data.sources", config.data.sources), ("data.eval_sources", config.data.eval_sources)):
        found += [f"{key}: {_missing(source)}" for source in sources if not (source.path / "index.json").is_file()]
    if config.checkpoint.every_steps > config.steps:
        found.append(f"checkpoint.every_steps: longer than the run of {config.steps} steps; only the end is saved")
    if config.optimizer.min_lr > config.optimizer.lr:
        found.append("optimizer.min_lr: larger than lr")
    if config.model.preset is not None and config.model.freeze and config.checkpoint.start_from is None:
        found.append("model.freeze: the frozen parts start from random weights and never learn")
    if config.model.lora is not None and _start(config).startswith("random"):
        found.append("model.lora: the frozen weights are random and never learn")
    if config.checkpoint.start_from is not None and not config.checkpoint.start_from.exists():
        found.append(f"checkpoint.start_from: {config.checkpoint.start_from} is not here")
    if config.parallel.tensor > config.model.shape.text.num_kv_heads:
        found.append(
            f"parallel.tensor: {config.parallel.tensor} ranks share {config.model.shape.text.num_kv_heads} key/value heads; "
            "each rank gathers all of them"
        )
    if config.megatron:
        names = ", ".join(config.megatron)
        found.append(f"megatron: {names} cannot be checked here; Megatron checks its fields when training starts")
    return found


def _missing(source: SourceConfig) -> str:
    return f"{source.name}: {source.path}/index.json is not here; write the folder with `glmv-data pack`"


def _start(config: TrainConfig) -> str:
    model = config.model
    if config.checkpoint.start_from is not None:
        return f"from the checkpoint {config.checkpoint.start_from}"
    if model.hf_folder is not None and model.load_weights:
        return f"from {model.hf_folder}"
    return f"random, standard deviation {model.init_std:g}"


def _data_sizes(config: TrainConfig) -> str:
    sizes = data_parallel_sizes(config)
    shown = [str(size) for size in sizes] if len(sizes) <= 16 else [*map(str, sizes[:12]), "...", str(sizes[-1])]
    ranks = config.parallel.model_ranks
    return f"{', '.join(shown)}  ({sizes[0] * ranks:,} to {sizes[-1] * ranks:,} ranks)"


def _precision(config: TrainConfig) -> str:
    precision = config.precision
    layers = {"auto": "te on CUDA where it is installed, torch elsewhere", "te": "te", "torch": "torch"}[precision.layers]
    return f"{precision.dtype}, layers: {layers}, fp8 text {precision.fp8_text}, fp8 vision {precision.fp8_vision}"
