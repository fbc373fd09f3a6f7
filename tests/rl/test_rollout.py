"""A wave of rollouts with an engine that loses answers: counted, done without, and the end of the run where it is too many.

The engine is scripted, because a real one loses nothing on demand; prompts, pictures, verifiers and the gathering are real.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch.distributed as dist

from megatron_glmv.config.base import validate
from megatron_glmv.config.prompts import PromptSourceConfig
from megatron_glmv.config.rewards import RewardsConfig
from megatron_glmv.config.rl import AlgorithmConfig
from megatron_glmv.data.chat import Chat
from megatron_glmv.rl.advantage import group_advantages
from megatron_glmv.rl.engines.engine import EngineDown, Request
from megatron_glmv.rl.prompt_reader import PromptReader
from megatron_glmv.rl.prompts import PromptError, PromptFiles
from megatron_glmv.rl.rewards.rewarder import Rewarder
from megatron_glmv.rl.rewards.tally import JudgeDown
from megatron_glmv.rl.rollout import Roller
from megatron_glmv.rl.types import Rollout
from tests.data.processor import write_processor
from tests.model import oracle
from tests.rl.prompt_files import REFERENCE, write_prompts

GATES = {"format": {"think": "optional", "answer": "optional"}}
REWARDS = validate(RewardsConfig, {"workers": 1, "gates": GATES, "domains": {"ocr": {"box": "none"}}})


class LosingEngine:
    """Answers with the reference, and loses what it is told to; last request first."""

    weights_on_every_rank = True

    def __init__(self) -> None:
        self.lost: dict[str, int] = {}
        self.ends: list[Rollout] = []
        self.seeds: list[int] = []

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Rollout]]]:
        for place, request in reversed(list(enumerate(requests))):
            self.seeds.append(request.seed)
            count = request.num_answers - self.lost.get(request.prompt.task.key, 0)
            zeros = np.zeros(2, dtype=np.float32)
            yield place, [Rollout(np.array([5, 6]), zeros, zeros > 0, "stop", REFERENCE)] * count + self.ends


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> PromptFiles:
    path = write_prompts(tmp_path_factory.mktemp("prompts"))
    return PromptFiles([PromptSourceConfig(path=path)], REWARDS)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PromptReader]:
    made = PromptReader(Chat(write_processor(tmp_path_factory.mktemp("processor"), 1568)), oracle.model_shape("digits"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def rewarder() -> Iterator[Rewarder]:
    with Rewarder(REWARDS) as made:
        yield made


@pytest.fixture
def engine() -> LosingEngine:
    return LosingEngine()


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def roller(files: PromptFiles, reader: PromptReader, rewarder: Rewarder, engine: LosingEngine) -> Roller:
    limits = {"max_bad_share": 0.5, "max_masked_share": 0.25, "max_missing_share": 0.25}
    return Roller(files, reader, engine, rewarder, max_prompt_tokens=200, **limits)


KEYS = [f"prompt-{place}" for place in range(4)]


def test_groups_come_in_the_order_of_the_prompts(roller: Roller, engine: LosingEngine) -> None:
    wave = roller.roll_out([*KEYS, KEYS[0]], 3, [1, 2])
    assert [group.prompt.task.key for group in wave.groups] == [*KEYS, KEYS[0]]
    assert all(answer.reward.value == 1 for group in wave.groups for answer in group.answers)
    assert all(group.prompt.patches is None and not group.prompt.files for group in wave.groups)
    assert len(set(engine.seeds)) == 5
    first = list(engine.seeds)
    roller.roll_out([*KEYS, KEYS[0]], 3, [1, 2])
    assert engine.seeds[5:] == first
    roller.roll_out(KEYS, 3, [1, 3])
    assert not set(engine.seeds[10:]) & set(first)


def test_lost_answers_are_counted_and_done_without(roller: Roller, engine: LosingEngine) -> None:
    engine.lost = {KEYS[1]: 4}
    wave = roller.roll_out(KEYS, 4, [0])
    assert [group.prompt.task.key for group in wave.groups] == [KEYS[0], *KEYS[2:]]
    assert (wave.unanswered, wave.missing) == (1, 4)
    engine.lost = {KEYS[1]: 4, KEYS[2]: 1}
    with pytest.raises(EngineDown, match=r"left out 5 of 16 answers, more than engine.max_missing_share 0.25"):
        roller.roll_out(KEYS, 4, [0])


def test_answers_that_the_engine_gave_up_are_masked_and_counted(roller: Roller, engine: LosingEngine) -> None:
    """Those that ended before a token of pixels are judged as they are."""
    zeros = np.zeros(2, dtype=np.float32)
    ends = [Rollout(np.array([5, 6]), zeros, zeros > 0, "abort", "half", given_up=given_up) for given_up in (True, False)]
    engine.ends = ends
    engine.lost = dict.fromkeys(KEYS, 2)
    wave = roller.roll_out(KEYS, 6, [0])
    for group in wave.groups:
        rewards = [answer.reward for answer in group.answers]
        assert [reward.value for reward in rewards[:5]] == [1.0] * 4 + [None] and rewards[4].reason == "aborted"
        assert rewards[5].value is not None and rewards[5].value < 1
        assert group_advantages([group], AlgorithmConfig()).values[0][4] is None
    assert wave.tally.metrics()["masked_by/aborted"] == 4 and wave.missing == 0
    engine.ends, engine.lost = ends[:1] * 2, dict.fromkeys(KEYS, 2)
    with pytest.raises(JudgeDown, match=r"8 of 24 answers could not be judged.*aborted 8; .*the engine gave the answer up"):
        roller.roll_out(KEYS, 6, [0])


def test_prompts_that_cannot_be_read_are_counted_up_to_a_share(
    files: PromptFiles, reader: PromptReader, rewarder: Rewarder, engine: LosingEngine
) -> None:
    limits = {"max_bad_share": 0.5, "max_masked_share": 0.25, "max_missing_share": 0.25}
    roller = Roller(files, reader, engine, rewarder, max_prompt_tokens=30, **limits)
    wave = roller.roll_out(["prompt-0", "missing", "prompt-1"], 2, [0])
    assert [group.prompt.task.key for group in wave.groups] == ["prompt-0"]
    assert "nowhere.png" in wave.bad_prompts[0]
    assert "a row has room for 30" in wave.bad_prompts[1]
    with pytest.raises(PromptError, match=r"12 of 13 that were drawn cannot be read"):
        roller.roll_out(["missing"] * 10, 2, [0])
