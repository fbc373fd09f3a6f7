"""What a configuration amounts to: parameters, tokens, ranks, and what deserves a second look.

Everything here is arithmetic on the configuration; it is what ``glmv check`` prints below the resolved tree.
"""

from __future__ import annotations

import math

from megatron_glmv.config.base import ConfigError
from megatron_glmv.config.count import count_parameters
from megatron_glmv.config.data import SourceConfig
from megatron_glmv.config.linears import adapted_layers, count_adapters, linear_layers
from megatron_glmv.config.rl_stage import RlConfig
from megatron_glmv.config.training import StageConfig, TrainConfig

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def summarize(config: StageConfig) -> str:
    """A short readable account of `config`, one fact a line.

    Raises:
        ConfigError: the model's numbers cannot be read.
    """
    lines = [*_parameters(config), f"weights       {_start(config)}"]
    lines += _rollout_lines(config) if isinstance(config, RlConfig) else []
    lines += _step_lines(config) if isinstance(config, TrainConfig) else []
    layout = config.parallel
    lines += [
        f"one replica   {layout.model_ranks} ranks: tensor {layout.tensor} x pipeline {layout.pipeline}"
        + (f" (virtual {layout.virtual_pipeline})" if layout.virtual_pipeline > 1 else "")
        + f" x context {layout.context}",
        f"data parallel {_data_sizes(config) if isinstance(config, TrainConfig) else 'any size'}",
        f"precision     {_precision(config)}",
    ]
    return "\n".join(lines + [f"warning: {text}" for text in warnings(config)])


def _parameters(config: StageConfig) -> list[str]:
    """Numbers of parameters by part, and what of them learns."""
    count = count_parameters(config.model.shape)
    frozen = config.model.freeze
    lines = ["parameters"]
    for name, number in (("vision", count.vision), ("merger", count.merger), ("text", count.text), ("head", count.head)):
        part = "text" if name == "head" else name
        lines.append(f"  {name:<10}{number:>18,}{'  frozen' if part in frozen or config.model.lora else ''}")
    return [*lines, f"  {'total':<10}{count.total:>18,}", *_adapters(config, count.total)]


def _step_lines(config: TrainConfig) -> list[str]:
    """Rows and tokens of a stage of training."""
    rows, length = config.global_batch_rows, config.sequence_length
    tokens = rows * length
    return [
        f"step          {rows:,} rows x {length:,} tokens = {tokens:,} tokens",
        f"stage         {config.steps:,} steps = {config.steps * tokens:,} tokens ({short(config.steps * tokens)})",
    ]


def _rollout_lines(config: RlConfig) -> list[str]:
    """Prompts and answers of a stage of reinforcement learning."""
    groups, size = config.sampling.prompts_per_step, config.sampling.group_size
    most = config.expansion.max_ratio if config.expansion.enabled else 1.0
    updates = config.algorithm.updates_per_rollout
    return [
        f"iteration     {groups:,} prompts x {size} answers = {groups * size:,} answers of at most "
        f"{config.max_answer_tokens:,} tokens; {updates} update{'s' if updates > 1 else ''}",
        f"rolled out    1 to {most:g} times as many prompts (expansion {'on' if config.expansion.enabled else 'off'}), "
        f"curriculum {'on' if config.curriculum.enabled else 'off'}",
        f"stage         {config.steps:,} iterations = {config.steps * groups * size:,} answers trained on",
        f"rows          {config.repack.row_length:,} tokens",
        f"engine        {config.engine.kind}",
    ]


def _adapters(config: StageConfig, total: int) -> list[str]:
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


def warnings(config: StageConfig) -> list[str]:
    """What is allowed, but probably not meant; one line each, the key first."""
    found = _source_warnings(config)
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


def _source_warnings(config: StageConfig) -> list[str]:
    """Of what rows or prompts come from."""
    found = []
    if isinstance(config, TrainConfig):
        for key, sources in (("data.sources", config.data.sources), ("data.eval_sources", config.data.eval_sources)):
            found += [f"{key}: {_missing(source)}" for source in sources if not (source.path / "index.json").is_file()]
    if isinstance(config, RlConfig):
        for key, files in (("sources", config.prompts.sources), ("eval_sources", config.prompts.eval_sources)):
            found += [f"prompts.{key}: {file.path} is not here" for file in files if not file.path.is_file()]
        if _start(config).startswith("random"):
            found.append("model: reinforcement learning from random weights earns no reward; name weights to start from")
    return found


def _missing(source: SourceConfig) -> str:
    return f"{source.name}: {source.path}/index.json is not here; write the folder with `glmv-data pack`"


def _start(config: StageConfig) -> str:
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


def _precision(config: StageConfig) -> str:
    precision = config.precision
    depends = precision.layers == "auto" and precision.layers_on_gpu == "te"
    layers = "te on CUDA where it is installed, torch elsewhere" if depends else precision.layers_on_gpu
    return f"{precision.dtype}, layers: {layers}, " + ", ".join(
        f"fp8 {tower} {recipe}" + (f" (bf16 in the first {ends[0]} and last {ends[1]} layers)" if any(ends) else "")
        for tower, recipe, ends in (
            ("text", precision.fp8_text, precision.bf16_ends_text),
            ("vision", precision.fp8_vision, precision.bf16_ends_vision),
        )
    )
