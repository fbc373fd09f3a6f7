"""The loop of reinforcement learning: draw, roll out, choose, update, hand the weights over, report, save.

Every rank runs it with the same groups, so all of them decide alike; what differs are the prompts that a rank rolls out and the
rows that its replica trains on.

Source: arXiv 2507.01006, section 5 (RLCS).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch.distributed as dist

from megatron_glmv.config.rl_stage import RlConfig
from megatron_glmv.rl.advantage import group_advantages
from megatron_glmv.rl.curriculum import Curriculum
from megatron_glmv.rl.engines.engine import Engine
from megatron_glmv.rl.expansion import Expansion
from megatron_glmv.rl.policy_step import update_on
from megatron_glmv.rl.reference import Reference
from megatron_glmv.rl.report import Iteration, by_name, describe, describe_groups, mean, record_of
from megatron_glmv.rl.rewards.rewarder import Rewarder
from megatron_glmv.rl.rollout import Roller, Wave, join_waves
from megatron_glmv.rl.rollout_files import rollout_file, write_rollouts
from megatron_glmv.rl.types import Group, Prompt, Task
from megatron_glmv.rl.weights import send_weights
from megatron_glmv.training.assemble import Assembly
from megatron_glmv.training.job import Job, freeze_setup
from megatron_glmv.training.observer import Observer
from megatron_glmv.training.profiler import Profiler
from megatron_glmv.training.recorder import Recorder
from megatron_glmv.training.saves import Saves
from megatron_glmv.training.state import TrainState, is_due
from megatron_glmv.training.stragglers import Stragglers

_TRAINING, _EVALUATION = 0, 1
"""Kinds of waves, for seeds that differ."""


@dataclass
class RlRun:
    """What the loop drives on this rank."""

    config: RlConfig
    assembly: Assembly
    saves: Saves
    state: TrainState
    curriculum: Curriculum
    expansion: Expansion
    engine: Engine
    rewarder: Rewarder
    roller: Roller
    eval_roller: Roller | None
    eval_keys: Sequence[str]
    reference: Reference | None
    recorder: Recorder | None
    """On the one rank that reports."""
    job: Job
    observer: Observer
    stragglers: Stragglers
    profiler: Profiler


class Reading:
    """How long this rank waits for its rows' pictures, which the update decodes again."""

    def __init__(self, read_pixels: Callable[[Group], Prompt]) -> None:
        self._read_pixels = read_pixels
        self.seconds = 0.0

    def read(self, group: Group) -> Prompt:
        """As the function given."""
        began = time.perf_counter()
        prompt = self._read_pixels(group)
        self.seconds += time.perf_counter() - began
        return prompt


class Clock:
    """Seconds of the phases of an iteration."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begun = self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """The time since the last lap, or since the beginning, went into `phase`."""
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now

    def total(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._begun


def train(run: RlRun) -> bool:
    """Train from the state's iteration to the last one, or until asked to stop, and leave a checkpoint.

    Returns:
        Whether the last iteration is done.
    """
    freeze_setup()
    return run.saves.run_to_end(run.state, run.config.steps, lambda: _train(run))


def _train(run: RlRun) -> bool:
    config, state = run.config, run.state
    run.job.watchdog.beat(state.step, "weights")
    send_weights(run.assembly.chunks, config.model.shape, run.engine, state.step)
    if state.step == 0 and run.eval_roller is not None:
        evaluate(run)
    began, first, stopping = time.perf_counter(), state.step, False
    while state.step < config.steps and not stopping:
        run.profiler.before_step(state.step + 1)
        with run.observer.watch(state.step + 1):
            record = iterate(run)
        run.profiler.after_step(state.step, last=state.step == config.steps)
        observation = run.observer.look(record["grad_norm"])
        if run.recorder is not None:
            if observation is not None:
                run.recorder.observe(state.step, observation)
            left_s = (time.perf_counter() - began) / (state.step - first) * (config.steps - state.step)
            run.recorder.write(record, "rl")
            run.recorder.show(describe(record, config.steps, left_s), important=state.step == config.steps)
        run.saves.poll(state)
        last = state.step == config.steps
        stopping = run.job.stop.is_agreed() and not last
        # Before the save, so that a run killed between the two evaluates again.
        if run.eval_roller is not None and (last or is_due(state.step, config.evaluation.every_steps)):
            evaluate(run)
        run.saves.after_step(state, last=last or stopping)
    return stopping


def iterate(run: RlRun) -> dict[str, Any]:
    """One iteration; returns its record."""
    config, state, clock = run.config, run.state, Clock()
    batch = config.sampling.prompts_per_step
    wave, tiers = roll_out(run)
    ratio = run.expansion.update(wave.groups)
    selection = run.expansion.select(wave.groups, batch)
    run.curriculum.observe(state.step, wave.groups)
    clock.lap("rollout")
    run.job.watchdog.beat(state.step, "update")
    chosen = [wave.groups[place] for place in selection.chosen]
    reading = Reading(run.roller.read_pixels)
    with run.stragglers.watch(state.step + 1):
        policy = update_on(run.assembly, config, chosen, state.step, reading.read, run.reference)
    ranks = run.stragglers.compare(reading.seconds)
    if ranks is not None and run.recorder is not None:
        run.recorder.write({"step": state.step + 1, "ranks": ranks}, "rl")
    clock.lap("update")
    run.job.watchdog.beat(state.step, "weights")
    send_weights(run.assembly.chunks, config.model.shape, run.engine, state.step + 1)
    clock.lap("weights")
    state.step += 1
    state.consumed_tokens += policy.tokens
    state.skipped_steps += policy.refused
    if policy.fault:
        text = f"iteration {state.step}: gradients are not finite: {policy.fault}; the update was refused, and the run goes on"
        run.job.events.record("skip", state.step, text)
    state.bad_samples += len(wave.bad_prompts)
    seconds = clock.seconds | {"rollout": wave.rollout_s, "reward": wave.reward_s, "total": clock.total()}
    record = record_of(
        Iteration(
            state.step,
            wave,
            selection,
            ratio,
            run.expansion.ratio_ema,
            policy,
            run.curriculum.report(),
            run.rewarder.meters(),
            seconds,
        )
    )
    if dist.get_rank() == 0:
        _warn(run, record, wave.bad_prompts)
        if is_due(state.step, config.rollouts_every_steps):
            listed = [tiers[group.prompt.task.key] for group in wave.groups]
            advantages = group_advantages(wave.groups, config.algorithm)
            path = rollout_file(config.run_folder, state.step)
            write_rollouts(path, state.step, wave.groups, set(selection.chosen), advantages, listed)
    return record


def roll_out(run: RlRun) -> tuple[Wave, dict[str, str]]:
    """The answers of one iteration, and the tier of each of its prompts when it was drawn."""
    config, step, batch = run.config, run.state.step, run.config.sampling.prompts_per_step
    waves: list[Wave] = []
    tiers: dict[str, str] = {}
    num_prompts = 0
    while not waves or run.expansion.wants_more([group for wave in waves for group in wave.groups], num_prompts, batch):
        run.job.watchdog.beat(step, "rollout")
        count = run.expansion.num_prompts(batch)
        keys = run.curriculum.draw(step, count)
        tiers |= {key: run.curriculum.tier_of(key) for key in keys}
        waves.append(run.roller.roll_out(keys, config.sampling.group_size, [config.seed, _TRAINING, step, len(waves)]))
        num_prompts += count
    return join_waves(waves), tiers


def evaluate(run: RlRun) -> dict[str, Any]:
    """Answers to the held-out prompts, sampled as in training; the same prompts and seeds each time."""
    assert run.eval_roller is not None
    config, step = run.config, run.state.step
    run.job.watchdog.beat(step, "evaluation")
    wave = run.eval_roller.roll_out(run.eval_keys, config.evaluation.answers, [config.seed, _EVALUATION])
    record = {"step": step, **describe_groups(wave.groups), **by_name(wave.tally.metrics())}
    if run.recorder is not None:
        run.recorder.write({"step": step, "eval": {key: value for key, value in record.items() if key != "step"}}, "rl")
        accuracy = record.get("accuracy", {})
        listed = ", ".join(f"{domain} {value:.1%}" for domain, value in accuracy.items())
        run.recorder.note(f"step {step}/{config.steps} | held-out accuracy {mean(accuracy.values()):.1%}: {listed}")
    return record


def held_out_keys(tasks: Sequence[Task], count: int) -> list[str]:
    """The first prompts of every domain and sub-category in turn, at most `count`."""
    cells: dict[tuple[str, str], list[str]] = {}
    for task in tasks:
        cells.setdefault((task.domain, task.subcategory), []).append(task.key)
    rounds = zip_longest(*(keys for _, keys in sorted(cells.items())))
    return [key for dealt in rounds for key in dealt if key is not None][:count]


def _warn(run: RlRun, record: Mapping[str, Any], bad_prompts: Sequence[str]) -> None:
    """Say what a person should look at."""
    assert run.recorder is not None
    for reason in bad_prompts[:3]:
        run.recorder.note(f"left out: {reason}")
    alarm = run.config.engine.gap_alarm
    gap = record.get("policy", {}).get("gap_mean", 0.0)
    if alarm is not None and gap > alarm:
        run.recorder.note(
            f"step {record['step']} | warning: engine and trainer differ by {gap:.2g} nats a token, over engine.gap_alarm "
            f"{alarm:g}: does the engine serve these weights, at this temperature, in this precision?"
        )
