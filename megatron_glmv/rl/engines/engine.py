"""What every rollout engine offers, whatever runs behind it.

An engine reads the trainer's own token ids, placeholders expanded, and answers with ids: no text is tokenised twice.
Weights arrive under Hugging Face's names, one tensor at a time, from the converter that also writes checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_glmv.config.base import InputError
from megatron_glmv.rl.force_answer import ForceRule
from megatron_glmv.rl.types import Prompt, Rollout
from megatron_glmv.run_folder.refusal import Outage


class EngineError(InputError):
    """An engine that is down, slow, or answers something else than it was asked; one line that says what to do."""


class EngineDown(EngineError, Outage):
    """An engine that is down or too slow, which it may not be when the run starts again."""


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled; the same for all of a run.

    Attributes:
        temperature: log-probabilities are of this temperature.
        top_p: share of the probability that is sampled from; 1: all of it.
        stop_tokens: an answer ends with the first of these, which belongs to it.
        rule: when thinking is closed by force, or the longest answer in tokens.
        text: token ids to text, special tokens kept.
    """

    temperature: float
    top_p: float
    stop_tokens: tuple[int, ...]
    rule: ForceRule | int
    text: Callable[[Sequence[int]], str]

    @property
    def max_tokens(self) -> int:
        """Longest answer, inserted tokens included."""
        return self.rule if isinstance(self.rule, int) else self.rule.max_tokens


@dataclass(frozen=True)
class Request:
    """Answers wanted to one prompt.

    Attributes:
        prompt: with patches, where it has frames.
        num_answers: how many.
        seed: of the sampling; the same request with the same weights gives the same answers.
    """

    prompt: Prompt
    num_answers: int
    seed: int


class Engine(Protocol):
    """Samples answers from the policy's newest weights.

    Attributes:
        weights_on_every_rank: whether every rank's engine takes new weights with `update_weights`, as one does that holds its
            own model. Otherwise rank 0 alone does, and the other ranks then call `expect_version`.
    """

    weights_on_every_rank: bool

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Rollout]]]:
        """Answers to each request, as soon as they are complete, so that they can be judged while others are sampled.

        Yields:
            The request's place and its answers, each request once, in any order; fewer answers than were asked for where some
            could not be had.

        Raises:
            EngineError: no answers can be had.
        """

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take new weights; every answer from now on is sampled from them and names `version`.

        Raises:
            EngineError: the weights did not arrive whole; the engine must not be used then.
        """

    def expect_version(self, version: int) -> None:
        """Take note that the weights have come with `update_weights`, here or on rank 0, which must be through with it.

        Raises:
            EngineError: the engine has no weights of this version.
        """

    def check_health(self) -> None:
        """Raise where the engine cannot answer.

        Raises:
            EngineError: says why.
        """

    def close(self) -> None:
        """Let go of what the engine holds."""
