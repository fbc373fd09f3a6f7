"""``glmv train`` on one rank: join the job, build or resume the run, drive the loop, and say clearly why it ended."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator

import torch.distributed as dist

from megatron_glmv.config.base import InputError, to_yaml
from megatron_glmv.config.model import ModelConfig
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.convert.checkpoint_folder import latest
from megatron_glmv.convert.hf_import import load_hf_weights
from megatron_glmv.model.glm4v import Glm4vModel
from megatron_glmv.parallel import groups, platform
from megatron_glmv.parallel.mcore import layer_kind
from megatron_glmv.training.assemble import Assembly, assemble, assemble_model
from megatron_glmv.training.checkpoint import Checkpointer
from megatron_glmv.training.flops import device_peak
from megatron_glmv.training.loop import Run, open_stream, train
from megatron_glmv.training.metrics import MetricsWriter, draw_loss
from megatron_glmv.training.recorder import METRICS_FILE
from megatron_glmv.training.state import TrainState
from megatron_glmv.training.watchdog import Watchdog, collective_timeout_s


def run(config: TrainConfig) -> int:
    """Run one stage; under torchrun every rank calls this.

    Returns:
        0 when the last step is done and saved, 1 when this rank or a peer failed.

    Raises:
        InputError: something that the user can repair: configuration, data or checkpoint.
    """
    config.check()
    config.data_parallel(groups.num_ranks())
    groups.initialize(config.parallel, config.seed, collective_timeout_s(config.parallel.timeout_s))
    watchdog = Watchdog(config.run_folder, dist.get_rank(), dist.get_world_size(), config.parallel.timeout_s)
    watchdog.start()
    try:
        with open_run(config, watchdog) as opened:
            train(opened)
        _draw(config)
    except InputError as error:
        watchdog.describe_failure(error)  # leaves the reason for the peers
        raise
    except Exception as error:  # noqa: BLE001  (whatever it is, the peers and the user must hear of it)
        report = watchdog.describe_failure(error)
        traceback.print_exc()
        print(f"glmv: error: {report}", file=sys.stderr, flush=True)
        return 1
    watchdog.stop()
    groups.destroy()
    return 0


@contextlib.contextmanager
def open_run(config: TrainConfig, watchdog: Watchdog) -> Iterator[Run]:
    """Build or resume the run on this rank, and close its threads and files at the end."""
    watchdog.beat(0, "building the model")
    models = assemble_model(config)
    assembly = assemble(config, models)
    checkpointer = Checkpointer(config, assembly.chunks, assembly.optimizer)
    watchdog.beat(0, "loading weights")
    state = _first_state(config, models, assembly, checkpointer)
    with contextlib.ExitStack() as stack:
        stream = open_stream(config, held_out=False, first_step=state.step)
        stack.callback(stream.close)
        eval_stream = open_stream(config, held_out=True) if config.data.eval_sources else None
        if eval_stream is not None:
            stack.callback(eval_stream.close)
        metrics = None
        if dist.get_rank() == 0:
            (config.run_folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            metrics = MetricsWriter(
                config.run_folder,
                config.metrics,
                config.steps,
                num_ranks=dist.get_world_size(),
                peak_tflops=_peak_tflops(config),
                first_step=state.step,
            )
            stack.callback(metrics.close)
            metrics.note(_headline(config, models, state))
        yield Run(config, assembly, checkpointer, state, stream, eval_stream, metrics, watchdog)


def _first_state(config: TrainConfig, models: list[Glm4vModel], assembly: Assembly, checkpointer: Checkpointer) -> TrainState:
    """Resume from the run's own newest checkpoint, else start from given weights, else from random ones."""
    state = checkpointer.load_latest()
    if state is not None:
        return state
    if config.checkpoint.start_from is not None:
        checkpointer.load_weights_only(config.checkpoint.start_from)
    elif starts_from_hf(config.model):
        assert config.model.hf_folder is not None
        load_hf_weights(models, config.model.hf_folder, config.model.shape)
        assembly.optimizer.reload_model_params()
    return TrainState()


def starts_from_hf(model: ModelConfig) -> bool:
    """Whether the first weights come from a Hugging Face folder."""
    return model.hf_folder is not None and model.load_weights


def _peak_tflops(config: TrainConfig) -> float | None:
    if config.metrics.peak_tflops is not None:
        return config.metrics.peak_tflops
    number_format = "fp8" if config.precision.fp8_text != "off" else config.precision.dtype
    peak = device_peak(platform.device_name(), number_format)
    return peak / 1e12 if peak else None


def _headline(config: TrainConfig, models: list[Glm4vModel], state: TrainState) -> str:
    """What runs here, in one line."""
    layout, data = config.parallel, groups.data_size()
    newest = latest(config.run_folder)
    origin = f"resuming {newest} at step {state.step}" if state.step else "starting"
    size = sum(parameter.numel() for model in models for parameter in model.parameters())
    return (
        f"{origin}: tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context} x data {data} "
        f"= {dist.get_world_size()} ranks on {platform.device_name()}, {config.precision.dtype}, "
        f"{layer_kind(config.precision)} layers, {size:,} parameters on rank 0"
    )


def _draw(config: TrainConfig) -> None:
    """The picture of the loss, by one rank."""
    if dist.get_rank() == 0 and (config.run_folder / METRICS_FILE).is_file():
        draw_loss(config.run_folder / METRICS_FILE, config.run_folder / "loss.png")
