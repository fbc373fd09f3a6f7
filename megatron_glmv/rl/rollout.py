"""One wave of rollouts: prompts dealt to the ranks, answers sampled and judged while others are sampled, groups shared.

Every rank ends with the same groups in the order of the prompts, so that whatever is decided from them is decided alike without
a word. Pixels stay where they were decoded.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_glmv.rl.engines.engine import Engine, EngineDown, Request
from megatron_glmv.rl.prompt_reader import BadPromptError, PromptReader
from megatron_glmv.rl.prompts import TOLERATED, PromptError, PromptFiles
from megatron_glmv.rl.rewards.rewarder import Rewarder
from megatron_glmv.rl.rewards.tally import Tally
from megatron_glmv.rl.types import Answer, Group, Prompt, Reward, Rollout, Task

_Judging = list[tuple[Rollout, Future[Reward]]]


@dataclass(frozen=True)
class Wave:
    """What came back; equal on all ranks.

    Attributes:
        groups: of every prompt that could be read and got an answer, in the order of the prompts.
        tally: rewards by domain.
        bad_prompts: why prompts could not be read.
        unanswered: prompts to which the engine gave no answer.
        missing: answers that were asked for and could not be had, those of unanswered prompts included.
        rollout_s: seconds until the slowest rank had its answers.
        reward_s: seconds that the slowest rank then waited for rewards.
        idle_share: of the rollout's seconds, what the ranks on average waited for the slowest.
    """

    groups: list[Group]
    tally: Tally
    bad_prompts: list[str]
    unanswered: int
    missing: int
    rollout_s: float
    reward_s: float
    idle_share: float


def join_waves(waves: Sequence[Wave]) -> Wave:
    """Waves that ran one after the other as one."""
    first, *rest = waves
    if not rest:
        return first
    groups = [group for wave in waves for group in wave.groups]
    seconds = sum(wave.rollout_s for wave in waves)
    return Wave(
        groups,
        _tally(groups),
        [reason for wave in waves for reason in wave.bad_prompts],
        unanswered=sum(wave.unanswered for wave in waves),
        missing=sum(wave.missing for wave in waves),
        rollout_s=seconds,
        reward_s=sum(wave.reward_s for wave in waves),
        idle_share=sum(wave.idle_share * wave.rollout_s for wave in waves) / seconds,
    )


class Roller:
    """Rolls out prompts on all ranks; every method is called on every rank.

    Args:
        files: where prompts stand.
        reader: reads them.
        engine: samples.
        rewarder: judges.
        max_prompt_tokens: longest prompt.
        max_bad_share: of the prompts drawn so far that may be unreadable.
        max_masked_share: of a wave's answers that may stay without a reward.
        max_missing_share: of a wave's answers that the engine may leave out.
    """

    def __init__(
        self,
        files: PromptFiles,
        reader: PromptReader,
        engine: Engine,
        rewarder: Rewarder,
        *,
        max_prompt_tokens: int,
        max_bad_share: float,
        max_masked_share: float,
        max_missing_share: float,
    ) -> None:
        self._files, self._reader, self._engine, self._rewarder = files, reader, engine, rewarder
        self._tasks = {task.key: task for task in files.tasks}
        self._max_prompt_tokens = max_prompt_tokens
        self._max_bad_share, self._max_masked_share = max_bad_share, max_masked_share
        self._max_missing_share = max_missing_share
        self._num_drawn = self._num_bad = 0

    def roll_out(self, keys: Sequence[str], num_answers: int, seed: Sequence[int]) -> Wave:
        """Sample and judge answers to prompts.

        Args:
            keys: of the prompts; the same on every rank.
            num_answers: to each.
            seed: of this wave; with the same weights, prompts and ranks it gives the same answers.

        Raises:
            PromptError: too many prompts cannot be read.
            EngineError: the engine gives no answers, or leaves out too many.
            TooManyMasked: too many answers could not be judged.
        """
        started = time.perf_counter()
        prompts, bad = self._read(range(dist.get_rank(), len(keys), dist.get_world_size()), keys)
        requests = [Request(prompt, num_answers, _seed(seed, place, keys[place])) for place, prompt in prompts]
        judging: dict[int, _Judging] = {}
        for number, rollouts in self._engine.generate(requests):
            place, prompt = prompts[number]
            judging[place] = [(rollout, judge(self._rewarder, prompt.task, rollout)) for rollout in rollouts]
        sampled = time.perf_counter()
        own: dict[str, Any] = {
            "groups": {place: _group(prompt, judging.get(place, [])) for place, prompt in prompts},
            "bad": bad,
            "sampled_s": sampled - started,
            "judged_s": time.perf_counter() - sampled,
        }
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        return self._join(parts, len(keys), num_answers)

    def read_pixels(self, group: Group) -> Prompt:
        """The group's prompt with its patches.

        Raises:
            BadPromptError: what was readable when it was rolled out is no more.
        """
        if not group.prompt.frames:
            return group.prompt
        key = group.prompt.task.key
        return self._reader.read(self._tasks[key], self._files.sample(key))

    def _read(self, places: Sequence[int], keys: Sequence[str]) -> tuple[list[tuple[int, Prompt]], list[str]]:
        prompts, bad = [], []
        for place in places:
            key = keys[place]
            try:
                sample = self._files.sample(key)
                prompt = self._reader.read(self._tasks[key], sample, files=not self._engine.weights_on_every_rank)
                if (length := len(prompt.tokens)) > self._max_prompt_tokens:
                    raise BadPromptError(f"prompt {key!r}: {length} tokens, and a row has room for {self._max_prompt_tokens}")
            except BadPromptError as error:
                bad.append(str(error))
            else:
                prompts.append((place, prompt))
        return prompts, bad

    def _join(self, parts: Sequence[dict[str, Any]], num_prompts: int, num_answers: int) -> Wave:
        """The wave from all ranks' parts."""
        found = {place: group for part in parts for place, group in part["groups"].items()}
        groups = [found[place] for place in sorted(found) if found[place].answers]
        bad = [reason for part in parts for reason in part["bad"]]
        self._num_drawn, self._num_bad = self._num_drawn + num_prompts, self._num_bad + len(bad)
        if self._num_bad > TOLERATED and self._num_bad > self._max_bad_share * self._num_drawn:
            raise PromptError(
                f"prompts: {self._num_bad} of {self._num_drawn} that were drawn cannot be read, more than "
                f"prompts.max_bad_share {self._max_bad_share:g}; for instance {bad[0]}"
            )
        missing = len(found) * num_answers - sum(len(group.answers) for group in groups)
        if missing > self._max_missing_share * len(found) * num_answers:
            raise EngineDown(
                f"the engine left out {missing} of {len(found) * num_answers} answers, more than engine.max_missing_share "
                f"{self._max_missing_share:g}; its log says why"
            )
        tally = _tally(groups)
        tally.check(self._max_masked_share)
        sampled = [part["sampled_s"] for part in parts]
        return Wave(
            groups,
            tally,
            bad,
            unanswered=len(found) - len(groups),
            missing=missing,
            rollout_s=max(sampled),
            reward_s=max(part["judged_s"] for part in parts),
            idle_share=1 - sum(sampled) / (len(sampled) * max(sampled)),
        )


def judge(rewarder: Rewarder, task: Task, rollout: Rollout) -> Future[Reward]:
    """The reward of an answer, when it is known; one that the engine gave up is masked: nobody knows how it would end."""
    if not rollout.given_up:
        return rewarder.submit(task, rollout.text)
    masked: Future[Reward] = Future()
    masked.set_result(Reward(None, None, "aborted", f"{task.key}: the engine gave the answer up"))
    return masked


def _tally(groups: Sequence[Group]) -> Tally:
    tally = Tally()
    for group in groups:
        for answer in group.answers:
            tally.add(group.prompt.task.domain, answer.reward)
    return tally


def _group(prompt: Prompt, judging: _Judging) -> Group:
    answers = tuple(Answer(rollout, reward.result()) for rollout, reward in judging)
    return Group(replace(prompt, patches=None, files=()), answers)


def _seed(seed: Sequence[int], place: int, key: str) -> int:
    """Of one request: differs by wave, place and prompt."""
    return int(np.random.SeedSequence([*seed, place, zlib.crc32(key.encode())]).generate_state(1, np.uint32)[0])
