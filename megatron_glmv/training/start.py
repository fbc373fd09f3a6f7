"""What a run starts from: its own newest checkpoint, weights that it is given, or random ones."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import torch.distributed as dist

from megatron_glmv.config.model import ModelConfig
from megatron_glmv.config.training import StageConfig
from megatron_glmv.convert.hf_import import load_hf_weights
from megatron_glmv.model.glm4v import Glm4vModel
from megatron_glmv.parallel import groups, platform
from megatron_glmv.parallel.mcore import layer_kind
from megatron_glmv.run_folder.launch import num_restarts
from megatron_glmv.training.assemble import Assembly
from megatron_glmv.training.checkpoint import Checkpointer
from megatron_glmv.training.job import Job
from megatron_glmv.training.state import TrainState


def first_state(
    config: StageConfig, models: Sequence[Glm4vModel], assembly: Assembly, checkpointer: Checkpointer
) -> TrainState:
    """Resume from the run's own newest checkpoint, else take the weights that the configuration names."""
    state = checkpointer.load_latest()
    if state is not None:
        return state
    load_start(config, models, assembly, checkpointer)
    return TrainState()


def load_start(config: StageConfig, models: Sequence[Glm4vModel], assembly: Assembly, checkpointer: Checkpointer) -> None:
    """Take the weights that the configuration names; none: the random ones stay."""
    if config.checkpoint.start_from is not None:
        checkpointer.load_weights_only(config.checkpoint.start_from)
    elif starts_from_hf(config.model):
        assert config.model.hf_folder is not None
        load_hf_weights(models, config.model.hf_folder, config.model.shape)
        assembly.optimizer.reload_model_params()


def starts_from_hf(model: ModelConfig) -> bool:
    """Whether the first weights come from a Hugging Face folder."""
    return model.hf_folder is not None and model.load_weights


def begin_run(
    job: Job, config: StageConfig, models: Sequence[Glm4vModel], checkpointer: Checkpointer, state: TrainState
) -> None:
    """Record and say what starts here."""
    details = {"ranks": dist.get_world_size(), "restarts": num_restarts(), "host": socket.gethostname()}
    job.events.record("start", state.step, describe_start(config, models, checkpointer.describe_origin(), state), details)


def describe_start(config: StageConfig, models: Sequence[Glm4vModel], origin: str, state: TrainState) -> str:
    """What runs here, in one line."""
    layout, data = config.parallel, groups.data_size()
    origin = f"resuming {origin} at step {state.step}" if state.step else f"starting{origin}"
    size = sum(parameter.numel() for model in models for parameter in model.parameters())
    return (
        f"{origin}: tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context} x data {data} "
        f"= {dist.get_world_size()} ranks on {platform.device_name()}, {config.precision.dtype}, "
        f"{layer_kind(config.precision)} layers, {size:,} parameters on rank 0"
    )
