"""Right answers counted, from models that answer now or from rollouts that were judged before."""

from __future__ import annotations

import json
import zlib
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_glmv.config.base import validate
from megatron_glmv.config.engines import VllmConfig
from megatron_glmv.config.grade import GradeConfig
from megatron_glmv.config.model import ModelConfig, ModelShape
from megatron_glmv.config.weight_map import check_hf_shapes
from megatron_glmv.convert.hf_folder import HfWeights
from megatron_glmv.data.chat import Chat, ProcessorError
from megatron_glmv.rl.engines.embedded import EmbeddedEngine
from megatron_glmv.rl.engines.engine import Engine, Request, Sampling
from megatron_glmv.rl.engines.vllm import VllmEngine
from megatron_glmv.rl.grade_counts import Count, GradeError
from megatron_glmv.rl.prompt_reader import BadPromptError, PromptReader
from megatron_glmv.rl.prompts import PromptFiles
from megatron_glmv.rl.rewards.rewarder import Rewarder
from megatron_glmv.rl.rewards.tally import Tally
from megatron_glmv.rl.rollout import judge
from megatron_glmv.rl.sampling import sampling_in_ids
from megatron_glmv.rl.types import Reward, Task

EARLY_CHECK = 50
"""Answers after which the share of masked ones is looked at while the work goes on."""
BATCHES = 4
"""Batches of an engine's answers that are asked for at once, with their prompts' pictures in memory."""


@dataclass(frozen=True)
class Model:
    """A Hugging Face folder to grade with.

    Attributes:
        folder: with config.json and safetensors.
        processor: folder with tokenizer, chat template and limits of pictures; None: the same.
        dtype: of weights and computation; auto: bfloat16 on a GPU, else float32.
        max_answers: answers that decode together.
        servers: addresses of vLLM servers that load the folder and answer; none: transformers in this process.
    """

    folder: Path
    processor: Path | None = None
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    max_answers: int = 64
    servers: tuple[str, ...] = ()

    @cached_property
    def shape(self) -> ModelShape:
        """The architecture's numbers.

        Raises:
            ConfigError: no config.json of the family.
        """
        return ModelConfig(hf_folder=self.folder).shape

    def open_chat(self) -> Chat:
        """Tokenizer and chat template.

        Raises:
            GradeError: the folder has none.
        """
        folder = self.processor or self.folder
        try:
            return Chat(folder)
        except ProcessorError as error:
            raise GradeError(f"{folder}: {error}; name a folder with tokenizer and chat template with --processor") from None


def open_engine(model: Model, sampling: Sampling) -> Engine:
    """The engine that answers with a model, its weights loaded.

    Args:
        model: what to answer with; the one place that tells apart how models are run.
        sampling: how.

    Raises:
        MappingError: weights that are missing or not of the architecture.
        EngineError: a server does not answer, or does not load them.
    """
    if model.servers:
        check_hf_shapes(HfWeights(model.folder).shapes, model.shape, str(model.folder))
        settings = {"kind": "vllm", "addresses": model.servers, "weights": {"folder": model.folder}}
        served = VllmEngine(model.shape, sampling, validate(VllmConfig, settings, where="--server"))
        served.load_folder(model.folder, version=0)
        return served
    has_gpu = torch.cuda.is_available()
    is_half = model.dtype == "bf16" or (model.dtype == "auto" and has_gpu)
    dtype, device = torch.bfloat16 if is_half else torch.float32, "cuda" if has_gpu else "cpu"
    engine = EmbeddedEngine(model.shape, sampling, max_answers=model.max_answers, dtype=dtype, device=device)
    engine.update_weights(_stream(HfWeights(model.folder), model), version=0)
    return engine


def _stream(weights: HfWeights, model: Model) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder, one in memory at a time."""
    check_hf_shapes(weights.shapes, model.shape, str(model.folder))
    for name, size in weights.shapes.items():
        yield name, weights.read(name, 0, size[0], None)


class Answering:
    """Counts right answers of one model.

    Args:
        model: answers.
        number: of the model, for seeds.
        config: sampling and limits.
        files: the prompts.
        rewarder: judges.
        max_prompt_tokens: longest prompt; None: what the model's positions leave beside the longest answer.
        seed: of all answers.
    """

    def __init__(
        self,
        model: Model,
        number: int,
        config: GradeConfig,
        files: PromptFiles,
        rewarder: Rewarder,
        *,
        max_prompt_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        self._number, self._files, self._rewarder, self._seed = number, files, rewarder, seed
        self._num_answers, self._max_masked = config.sampling.group_size, config.rewards.max_masked_share
        chat = model.open_chat()
        sampling = sampling_in_ids(config.sampling, config.force_answer, model.shape, chat)
        longest = sampling.max_tokens
        room = model.shape.text.max_positions - longest
        if room < 1:
            raise GradeError(
                f"{model.folder}: has {model.shape.text.max_positions:,} positions, and an answer may take {longest:,}; lower "
                "--max-tokens, or force_answer's budgets in the configuration"
            )
        self._max_prompt_tokens = min(room, max_prompt_tokens or room)
        self._engine = open_engine(model, sampling)
        self._reader = PromptReader(chat, model.shape, "gpu" if torch.cuda.is_available() else "cpu")
        self._at_once = max(1, BATCHES * model.max_answers // self._num_answers)
        self.tally = Tally()

    def count(self, tasks: Sequence[Task]) -> Iterator[tuple[str, Count]]:
        """Counts of prompts, as soon as they are known.

        Yields:
            A prompt's key and its count, each prompt once, in any order.

        Raises:
            EngineError: the engine gives no answers.
            TooManyMasked: too many answers could not be judged.
        """
        waiting: deque[tuple[Task, list[Future[Reward]]]] = deque()
        for start in range(0, len(tasks), self._at_once):
            requests = []
            for task in tasks[start : start + self._at_once]:
                try:
                    requests.append(self._read(task))
                except BadPromptError as error:
                    yield task.key, Count(fault=str(error))
            earlier = len(waiting)
            for place, rollouts in self._engine.generate(requests):
                task = requests[place].prompt.task
                waiting.append((task, [judge(self._rewarder, task, rollout) for rollout in rollouts]))
                while waiting and all(future.done() for future in waiting[0][1]):
                    yield self._result(*waiting.popleft())
                    earlier -= 1
            for _ in range(earlier):  # of the wave before; this one's are judged during the next
                yield self._result(*waiting.popleft())
        while waiting:
            yield self._result(*waiting.popleft())
        self.tally.check(self._max_masked)

    def close(self) -> None:
        """Let go of the model and the decoders."""
        self._reader.close()
        self._engine.close()

    def _read(self, task: Task) -> Request:
        prompt = self._reader.read(task, self._files.sample(task.key), files=not self._engine.weights_on_every_rank)
        if (length := len(prompt.tokens)) > self._max_prompt_tokens:
            raise BadPromptError(f"prompt {task.key!r}: {length} tokens, and there is room for {self._max_prompt_tokens}")
        return Request(prompt, self._num_answers, _seed(self._seed, self._number, task.key))

    def _result(self, task: Task, judging: Sequence[Future[Reward]]) -> tuple[str, Count]:
        rewards = [future.result() for future in judging]
        before = self.tally.num_answers
        for reward in rewards:
            self.tally.add(task.domain, reward)
        if before < EARLY_CHECK <= self.tally.num_answers:
            self.tally.check(self._max_masked)
        judged = [reward for reward in rewards if reward.value is not None]
        right = sum(reward.correct is True for reward in judged)
        return task.key, Count(len(judged), right, len(rewards) - len(judged))


def count_rollouts(files: Sequence[Path], tasks: Iterable[Task]) -> tuple[dict[str, Count], int]:
    """Counts from rollouts files of `glmv rl`, all groups of a prompt together.

    Args:
        files: to read.
        tasks: the prompts; groups of others, or that asked something else under the same key, are left out.

    Returns:
        Counts by key, and how many groups were left out.

    Raises:
        GradeError: a file cannot be read, or a line is none of rollouts.
    """
    known = {task.key: task for task in tasks}
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    others = 0
    for file in files:
        try:
            with file.open("rb") as source:
                for number, line in enumerate(source, 1):
                    if line.strip():
                        others += not _add_group(line, known, found, f"{file}, line {number}")
        except OSError as error:
            raise GradeError(f"{file}: cannot be read ({error.strerror})") from None
    return {key: Count(answers, right, masked) for key, (answers, right, masked) in found.items()}, others


def _add_group(line: bytes, known: dict[str, Task], found: dict[str, list[int]], where: str) -> bool:
    """Count a group; False where it belongs to no known prompt."""
    try:
        tree: dict[str, Any] = json.loads(line)
        task = known.get(tree["key"])
        asked = (tree["domain"], tree["question"], tree["answer"])
        rewards = [(answer["reward"], answer["correct"]) for answer in tree["answers"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise GradeError(f"{where}: no group of rollouts; --rollouts takes files of a run's folder rollouts") from None
    if task is None or asked != (task.domain, task.question, task.answer):
        return False
    judged = [correct for value, correct in rewards if value is not None]
    count = found[task.key]
    for place, more in enumerate((len(judged), sum(correct is True for correct in judged), len(rewards) - len(judged))):
        count[place] += more
    return True


def _seed(seed: int, model: int, key: str) -> int:
    """Of one request: differs by model and prompt, and not by what is done beside it."""
    return int(np.random.SeedSequence([seed, model, zlib.crc32(key.encode())]).generate_state(1, np.uint32)[0])
