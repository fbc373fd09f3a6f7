"""The training loop: rows, step, report, evaluate, save; everything else is assembled elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass

from megatron_glmv.config.training import TrainConfig
from megatron_glmv.data.loader import RowStream
from megatron_glmv.parallel import groups
from megatron_glmv.training.assemble import Assembly
from megatron_glmv.training.checkpoint import Checkpointer
from megatron_glmv.training.data_order import keep_rows
from megatron_glmv.training.guard import Guard
from megatron_glmv.training.job import Job, freeze_setup
from megatron_glmv.training.metrics import MetricsWriter, StepMetrics
from megatron_glmv.training.observer import Observer
from megatron_glmv.training.profiler import Profiler
from megatron_glmv.training.saves import Saves
from megatron_glmv.training.state import TrainState, is_due
from megatron_glmv.training.step import StepResult, evaluate_step, row_key, train_step
from megatron_glmv.training.stragglers import Stragglers


@dataclass
class Run:
    """What the loop drives on this rank."""

    config: TrainConfig
    assembly: Assembly
    checkpointer: Checkpointer
    saves: Saves
    state: TrainState
    stream: RowStream
    eval_stream: RowStream | None
    metrics: MetricsWriter | None
    """On the one rank that reports."""
    job: Job
    guard: Guard
    observer: Observer
    stragglers: Stragglers
    profiler: Profiler


def train(run: Run) -> bool:
    """Train from the state's step to the last one, or until asked to stop, and leave a checkpoint.

    Returns:
        Whether the last step is done.
    """
    freeze_setup()
    return run.saves.run_to_end(run.state, run.config.steps, lambda: _train(run))


def _train(run: Run) -> bool:
    config, state, watchdog = run.config, run.state, run.job.watchdog
    stopping = False
    while state.step < config.steps and not stopping:
        started, waited = time.perf_counter(), run.stream.wait_s
        watchdog.beat(state.step, "data")
        batch = run.stream.step(state.next_batch())
        watchdog.rows = [row_key(row) for row in batch.rows]
        watchdog.beat(state.step, "step")
        run.profiler.before_step(state.step + 1)
        with run.observer.watch(state.step + 1), run.stragglers.watch(state.step + 1):
            result = train_step(run.assembly, batch, state.step, guard=run.guard, stop=run.job.stop.is_requested())
        run.profiler.after_step(state.step + 1, last=state.step + 1 == config.steps)
        if went_back(run, result):
            continue
        advance(state, config, result)
        observation = run.observer.look(result.grad_norm)
        wait_s = run.stream.wait_s - waited
        ranks = run.stragglers.compare(wait_s)
        if run.metrics is not None:
            run.metrics.log_step(describe_step(config, state, result, time.perf_counter() - started, wait_s))
            if ranks is not None:
                run.metrics.log_ranks(state.step, ranks)
            if observation is not None:
                run.metrics.log_observation(state.step, observation)
        run.saves.poll(state)
        last = state.step == config.steps
        stopping = result.agreement.stop and not last
        # Before the save, so that a run killed between the two evaluates again.
        if run.eval_stream is not None and (last or is_due(state.step, config.evaluation.every_steps)):
            evaluate(run)
        run.saves.after_step(state, last=last or stopping)
    return stopping


def went_back(run: Run, result: StepResult) -> bool:
    """Do what the guard's policy wants about the step just done; returns whether the run is at a checkpoint again.

    Raises:
        GuardError: the policy ends the run.
    """
    state, finite = run.state, result.agreement.finite
    verdict = run.guard.judge(result.loss, result.grad_norm, applied=result.applied, finite=finite)
    if verdict is None:
        return False
    reason = verdict.reason if finite else f"{verdict.reason}: {run.assembly.own_gradients.blame()}"
    if verdict.policy == "rollback":
        left_out = run.guard.left_out_with(state.next_batch())
        run.job.watchdog.beat(state.step, "rollback")
        if (saved := run.checkpointer.return_to_latest()) is not None:
            run.guard.count_return(saved.step)
            keep_rows(saved, run.config.global_batch_rows)
            vars(state).update(vars(saved), order=state.order, left_out=tuple(sorted({*saved.left_out, *left_out})))
            if run.metrics is not None:
                run.metrics.go_back(state.step)
            text = f"{reason}; back to the checkpoint of step {state.step}, batches left out: {', '.join(map(str, left_out))}"
            run.job.events.record("rollback", state.step, text, {"left_out": state.left_out})
            return True
        reason += "; there is no checkpoint to go back to"
    run.job.events.record("skip", state.step + 1, f"{reason}; the update was refused, and the run goes on")
    return False


def evaluate(run: Run) -> float:
    """Mean loss over the first rows of the held-out sources; the same rows each time."""
    assert run.eval_stream is not None
    batches = max(1, run.config.evaluation.rows // run.config.global_batch_rows)
    loss, tokens = 0.0, 0
    for batch in range(batches):
        run.job.watchdog.beat(run.state.step, "evaluation")
        batch_loss, batch_tokens = evaluate_step(run.assembly, run.eval_stream.step(batch))
        loss, tokens = loss + batch_loss, tokens + batch_tokens
    mean = loss / max(tokens, 1)
    if run.metrics is not None:
        run.metrics.log_evaluation(run.state.step, mean, tokens)
    return mean


def advance(state: TrainState, config: TrainConfig, result: StepResult) -> None:
    """Count one step."""
    state.batch = state.next_batch() + 1
    state.step += 1
    state.consumed_rows += config.global_batch_rows
    state.consumed_tokens += result.trained_tokens
    state.skipped_steps += not result.applied
    state.bad_samples += result.counts.bad_samples


def describe_step(config: TrainConfig, state: TrainState, result: StepResult, seconds: float, wait_s: float) -> StepMetrics:
    """One step's report."""
    return StepMetrics(
        step=state.step,
        loss=result.loss,
        learning_rates=result.learning_rates,
        grad_norm=result.grad_norm,
        applied=result.applied,
        trained_tokens=result.trained_tokens,
        useful_tokens=result.counts.useful_tokens,
        total_tokens=config.global_batch_rows * config.data.sequence_length,
        images=result.counts.images,
        seconds=seconds,
        loader_wait_s=wait_s,
        flops=result.counts.flops,
        skew=result.counts.skew,
        skipped_steps=state.skipped_steps,
        bad_samples=state.bad_samples,
    )


def open_stream(config: TrainConfig, *, held_out: bool, first_step: int = 0) -> RowStream:
    """This rank's stream of training or held-out rows."""
    data = config.data
    return RowStream(
        data.eval_sources if held_out else data.sources,
        data,
        config.model.shape,
        seed=config.seed,
        global_batch_rows=config.global_batch_rows,
        data_rank=groups.data_rank(),
        data_size=groups.data_size(),
        decode=groups.decodes_media(),
        align=config.parallel.row_alignment,
        first_step=first_step,
        shuffle=False if held_out else None,
        fault_log=config.run_folder / f"bad_samples_{'eval' if held_out else 'train'}_{groups.data_rank()}.jsonl",
    )
