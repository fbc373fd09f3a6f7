"""``glmv train`` on one rank: build or resume the run, drive the loop, draw its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from megatron_glmv.config.base import to_yaml
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.parallel import platform
from megatron_glmv.parallel.mcore import hardware
from megatron_glmv.plan.devices import device_peak
from megatron_glmv.run_folder.metrics_file import METRICS_FILE
from megatron_glmv.training.assemble import assemble, assemble_model
from megatron_glmv.training.checkpoint import Checkpointer
from megatron_glmv.training.data_order import adopt_order, keep_rows
from megatron_glmv.training.guard import Guard
from megatron_glmv.training.job import Job, fit_to_device, run_job
from megatron_glmv.training.loop import Run, open_stream, train
from megatron_glmv.training.metrics import MetricsWriter, draw_loss
from megatron_glmv.training.observer import Observer
from megatron_glmv.training.planned import plan_run
from megatron_glmv.training.profiler import Profiler
from megatron_glmv.training.saves import Saves
from megatron_glmv.training.start import begin_run, first_state
from megatron_glmv.training.stragglers import Stragglers


def run(config: TrainConfig) -> int:
    """Run one stage; under torchrun every rank calls this.

    Returns:
        0 when the last step is done and saved, or the run was asked to stop and has saved; 1 when this rank or a peer failed.

    Raises:
        InputError: something that the user can repair: configuration, data or checkpoint.
    """
    config = fit_to_device(config, hardware())

    def work(job: Job) -> bool:
        with open_run(config, job) as opened:
            finished = train(opened)
        _draw(config)
        return finished

    return run_job(config, work)


@contextlib.contextmanager
def open_run(config: TrainConfig, job: Job) -> Iterator[Run]:
    """Build or resume the run on this rank, and close its threads and files at the end."""
    watchdog = job.watchdog
    watchdog.beat(0, "building the model")
    models = assemble_model(config)
    assembly = assemble(config, models, watchdog.begin_row)
    checkpointer = Checkpointer(config, assembly.chunks, assembly.optimizer, job.events)
    watchdog.beat(0, "loading weights")
    state = first_state(config, models, assembly, checkpointer)
    changes = keep_rows(state, config.global_batch_rows)
    with contextlib.ExitStack() as stack:
        stream = open_stream(config, held_out=False, first_step=state.next_batch())
        stack.callback(stream.close)
        changes += adopt_order(state, stream.order)
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
            job.events.say = metrics.note
        begin_run(job, config, models, checkpointer, state)
        for change in changes:
            job.events.record("order", state.step, change)
        if metrics is not None and (planned := plan_run(config, platform.device_name(), dist.get_world_size())):
            metrics.log_plan(state.step, planned)
        observer, stragglers = Observer(assembly), Stragglers(assembly)
        profiler = Profiler(config.profile, config.run_folder, dist.get_rank(), metrics.note if metrics else None)
        yield Run(
            config,
            assembly,
            checkpointer,
            Saves(checkpointer, config.checkpoint, job, metrics.log_save if metrics else None),
            state,
            stream,
            eval_stream,
            metrics,
            job,
            Guard(config.guard, state),
            observer,
            stragglers,
            profiler,
        )


def _peak_tflops(config: TrainConfig) -> float | None:
    if config.metrics.peak_tflops is not None:
        return config.metrics.peak_tflops
    number_format = "fp8" if config.precision.fp8_text != "off" else config.precision.dtype
    peak = device_peak(platform.device_name(), number_format)
    return peak / 1e12 if peak else None


def _draw(config: TrainConfig) -> None:
    """The picture of the loss, by one rank."""
    if dist.get_rank() == 0 and (config.run_folder / METRICS_FILE).is_file():
        draw_loss(config.run_folder / METRICS_FILE, config.run_folder / "loss.png")
