"""``glmv rl`` on one rank: prompts, policy, engine and rewards put together, and the loop driven."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_glmv.config.base import ConfigError, to_yaml
from megatron_glmv.config.engines import VllmConfig
from megatron_glmv.config.rl_stage import RlConfig
from megatron_glmv.convert.processor import find_processor
from megatron_glmv.data.chat import Chat, ProcessorError
from megatron_glmv.parallel import platform
from megatron_glmv.parallel.mcore import hardware
from megatron_glmv.rl.curriculum import Curriculum
from megatron_glmv.rl.engines.embedded import EmbeddedEngine
from megatron_glmv.rl.engines.engine import Engine, Sampling
from megatron_glmv.rl.engines.vllm import VllmEngine
from megatron_glmv.rl.expansion import Expansion
from megatron_glmv.rl.picture import draw_curves
from megatron_glmv.rl.prompt_reader import PromptReader
from megatron_glmv.rl.prompts import PromptFiles
from megatron_glmv.rl.reference import Reference
from megatron_glmv.rl.rewards.rewarder import Rewarder
from megatron_glmv.rl.rollout import Roller
from megatron_glmv.rl.sampling import sampling_in_ids
from megatron_glmv.rl.trainer import RlRun, held_out_keys, train
from megatron_glmv.run_folder.checkpoint_folder import CheckpointError, find
from megatron_glmv.run_folder.metrics_file import METRICS_FILE
from megatron_glmv.training.assemble import assemble, assemble_model
from megatron_glmv.training.checkpoint import Checkpointer
from megatron_glmv.training.job import Job, fit_to_device, run_job
from megatron_glmv.training.observer import Observer
from megatron_glmv.training.profiler import Profiler
from megatron_glmv.training.recorder import Recorder, record_save
from megatron_glmv.training.saves import Saves
from megatron_glmv.training.start import begin_run, first_state, load_start
from megatron_glmv.training.stragglers import Stragglers

PICTURE = "curves.png"
STATE_FILE = "rl.json"
"""Of a checkpoint: curriculum and expansion."""


def run(config: RlConfig) -> int:
    """Run one stage; under torchrun every rank calls this.

    Returns:
        0 when the last iteration is done and saved, or the run was asked to stop and has saved; 1 when this rank or a peer
        failed.

    Raises:
        InputError: something that the user can repair: configuration, prompts, checkpoint, engine or judge.
    """
    config = fit_to_device(config, hardware())

    def work(job: Job) -> bool:
        with open_run(config, job) as opened:
            finished = train(opened)
        if dist.get_rank() == 0 and (config.run_folder / METRICS_FILE).is_file():
            draw_curves(config.run_folder / METRICS_FILE, config.run_folder / PICTURE)
        return finished

    return run_job(config, work)


@contextlib.contextmanager
def open_run(config: RlConfig, job: Job) -> Iterator[RlRun]:
    """Build or resume the run on this rank, and close its threads, processes and files at the end."""
    watchdog = job.watchdog
    watchdog.beat(0, "reading the prompts")
    share = config.prompts.max_bad_share
    sources = (config.prompts.sources, config.prompts.eval_sources)
    files, held_out = (PromptFiles(given, config.rewards, max_bad_share=share) if given else None for given in sources)
    assert files is not None
    curriculum = Curriculum(files.tasks, config.curriculum, seed=config.seed, offline=files.offline)
    expansion = Expansion(config.expansion)
    chat = _open_chat(config)
    watchdog.beat(0, "building the model")
    models = assemble_model(config)
    assembly = assemble(config, models, watchdog.begin_row)
    checkpointer = Checkpointer(config, assembly.chunks, assembly.optimizer, job.events)
    watchdog.beat(0, "loading weights")
    reference = None
    if config.algorithm.kl_coefficient:
        load_start(config, models, assembly, checkpointer)
        reference = Reference(models)
    state = first_state(config, models, assembly, checkpointer)
    _load_state(checkpointer.origin, curriculum, expansion)
    sampling = sampling_in_ids(config.sampling, config.force_answer, config.model.shape, chat)
    max_prompt_tokens = config.prompts.max_tokens or config.repack.row_length - sampling.max_tokens
    with contextlib.ExitStack() as stack:
        engine = open_engine(config, sampling, max_prompt_tokens)
        stack.callback(engine.close)
        reader = PromptReader(chat, config.model.shape, _decode_device(config), config.prompts.decode_threads)
        stack.callback(reader.close)
        rewarder = stack.enter_context(Rewarder(config.rewards))

        def roller(of: PromptFiles) -> Roller:
            return Roller(
                of,
                reader,
                engine,
                rewarder,
                max_prompt_tokens=max_prompt_tokens,
                max_bad_share=share,
                max_masked_share=config.rewards.max_masked_share,
                max_missing_share=config.engine.max_missing_share,
            )

        recorder = None
        if dist.get_rank() == 0:
            (config.run_folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            # Without a checkpoint the run begins anew, with its first evaluation, which is recorded at step 0.
            recorder = Recorder(config.run_folder, config.metrics, state.step or -1)
            stack.callback(recorder.close)
            job.events.say = recorder.note
        begin_run(job, config, models, checkpointer, state)
        if recorder is not None:
            recorder.note(files.describe())
        report = functools.partial(record_save, recorder, kind="rl") if recorder is not None else None
        yield RlRun(
            config,
            assembly,
            Saves(checkpointer, config.checkpoint, job, report, lambda: {STATE_FILE: _state(curriculum, expansion)}),
            state,
            curriculum,
            expansion,
            engine,
            rewarder,
            roller(files),
            roller(held_out) if held_out is not None else None,
            held_out_keys(held_out.tasks, config.evaluation.prompts) if held_out is not None else (),
            reference,
            recorder,
            job,
            Observer(assembly),
            Stragglers(assembly),
            Profiler(config.profile, config.run_folder, dist.get_rank(), recorder.note if recorder else None),
        )


def open_engine(config: RlConfig, sampling: Sampling, max_prompt_tokens: int) -> Engine:
    """The configured engine of this rank, still without weights."""
    dtype = torch.float32 if config.precision.dtype == "fp32" else torch.bfloat16
    shape, settings = config.model.shape, config.engine
    if isinstance(settings, VllmConfig):
        return VllmEngine(shape, sampling, settings, dtype=dtype, max_prompt_tokens=max_prompt_tokens)
    return EmbeddedEngine(shape, sampling, max_answers=settings.max_answers, dtype=dtype, device=platform.device())


def _open_chat(config: RlConfig) -> Chat:
    """The tokenizer and template of the prompts' processor."""
    folder = config.prompts.processor
    if folder is None and config.checkpoint.start_from is not None:
        folder = find_processor(find(config.checkpoint.start_from))
    folder = folder or config.model.hf_folder
    if folder is None:
        raise ConfigError("prompts.processor: name the folder with tokenizer and chat template; the weights lead to none")
    try:
        return Chat(folder)
    except ProcessorError as error:
        raise ConfigError(f"prompts.processor: {error}") from None


def _decode_device(config: RlConfig) -> Literal["cpu", "gpu"]:
    chosen = config.prompts.decode_device
    if chosen == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return chosen


def _state(curriculum: Curriculum, expansion: Expansion) -> dict[str, Any]:
    """What a resumed run needs besides counters, weights and optimizer."""
    return {"curriculum": curriculum.state_dict(), **expansion.state_dict()}


def _load_state(folder: Path | None, curriculum: Curriculum, expansion: Expansion) -> None:
    """Continue curriculum and expansion from the checkpoint that the counters came from; None: there is none."""
    if folder is None:
        return
    try:
        tree = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE_FILE}: cannot be read ({error}); is it a run of `glmv rl`?") from None
    curriculum.load_state_dict(tree["curriculum"])
    expansion.load_state_dict(tree)
