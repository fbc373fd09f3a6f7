"""From a configuration to everything that a step needs on this rank: model chunks under Megatron's DDP, and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer import TransformerConfig

from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.training import StageConfig
from megatron_glmv.convert.lora import adapter_plans
from megatron_glmv.model.glm4v import Glm4vModel, build_model
from megatron_glmv.model.initialize import initialize_weights
from megatron_glmv.model.lora import attach_adapters
from megatron_glmv.training.optimizer import build_optimizer
from megatron_glmv.training.own_gradients import OwnGradients


@dataclass(frozen=True)
class Assembly:
    """This rank's part of the run."""

    config: StageConfig
    shape: ModelShape
    chunks: list[DistributedDataParallel]
    """The model: one wrapped chunk, or one for each virtual pipeline stage."""
    optimizer: MegatronOptimizer
    own_gradients: OwnGradients
    """Marks what is not finite before it is reduced."""
    begin_row: Callable[[int, int, str], None]
    """Told of each micro-batch that begins: its number, their number, the row's id."""

    @property
    def models(self) -> list[Glm4vModel]:
        """The chunks without their wrappers."""
        return [chunk.module for chunk in self.chunks]


def assemble_model(config: StageConfig) -> list[Glm4vModel]:
    """Build this rank's chunks with their first random weights, and adapters if wanted; process groups must exist.

    Raises:
        ConfigError: a part of the configuration that cannot run here.
    """
    models = build_model(
        config.model.shape,
        config.parallel,
        config.precision,
        config.recompute,
        megatron=config.megatron,
        freeze=config.model.freeze,
        accumulates=True,
    )
    if config.model.lora is not None:
        attach_adapters(models, adapter_plans(config.model.lora, config.model.shape), config.model.lora)
    initialize_weights(models, config.seed, config.model.init_std)
    return models


def assemble(
    config: StageConfig,
    models: Sequence[Glm4vModel],
    begin_row: Callable[[int, int, str], None] = lambda number, total, key: None,
) -> Assembly:
    """Wrap the chunks, build the optimizer and connect both to Megatron's schedules.

    Args:
        config: the whole configuration.
        models: this rank's chunks, with the weights that training starts from.
        begin_row: told of each micro-batch that begins.
    """
    chunks = _wrap(config, models)
    optimizer = build_optimizer(chunks, config)
    _connect(models[0].config, chunks, optimizer, config)
    return Assembly(config, config.model.shape, chunks, optimizer, OwnGradients(chunks), begin_row)


def _wrap(config: StageConfig, models: Sequence[Glm4vModel]) -> list[DistributedDataParallel]:
    layout = config.parallel
    overlap = layout.overlap and parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and layout.distributed_optimizer,
        use_distributed_optimizer=layout.distributed_optimizer,
        check_for_nan_in_grad=True,  # what is done then is `OwnGradients`
    )
    return [
        DistributedDataParallel(model.config, ddp, model, disable_bucketing=number > 0) for number, model in enumerate(models)
    ]


def _connect(
    megatron: TransformerConfig, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, config: StageConfig
) -> None:
    """Give Megatron's schedules the functions that they call at the edges of a step.

    Source: megatron-core 0.16.1, model_parallel_config.py (the hooks); Megatron-LM, megatron/training/training.py (their use).
    """
    megatron.finalize_model_grads_func = finalize_model_grads
    megatron.grad_scale_func = optimizer.scale_loss
    ddp = chunks[0].ddp_config
    if ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        megatron.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        if len(chunks) > 1:
            megatron.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
    if ddp.overlap_param_gather and len(chunks) > 1:
        megatron.param_sync_func = [chunk.start_param_sync for chunk in chunks]
