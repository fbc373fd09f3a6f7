"""An answer as an engine writes it, with over-long thinking closed by force: how much to sample next, and what was put in.

The model may think for `thinking_tokens`. If it has not closed its thinking by then, the tokens that close it and open the
answer are inserted, marked, and `answer_tokens` more may be sampled; if it has closed it, it has `answer_tokens` from there.
The state depends on the tokens alone and not on how many came at a time, so an engine that samples token by token and a server
that is asked for whole pieces write the same rollout.

    answer = Writing(rule)
    while answer.budget:
        tokens, logprobs, stopped = sample(prompt + answer.tokens, max_tokens=answer.budget)
        answer.add(tokens, logprobs, stopped=stopped)

Source: arXiv 2507.01006, section 5.3 (forced answers); the authors' inference/trans_infer_bench.py, zai-org/GLM-V (what is
inserted and the two budgets).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_glmv.rl.types import Finish, Rollout


@dataclass(frozen=True)
class ForceRule:
    """When and how thinking is closed.

    Attributes:
        thinking_tokens: tokens until thinking is closed by force.
        answer_tokens: tokens after thinking was closed.
        end_of_think: ids that close thinking, at least one.
        answer_open: ids inserted after them; may be empty.
    """

    thinking_tokens: int
    answer_tokens: int
    end_of_think: tuple[int, ...]
    answer_open: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min(self.thinking_tokens, self.answer_tokens, len(self.end_of_think)) < 1:
            raise ValueError("force answering needs both budgets and at least one token that ends thinking")

    @property
    def max_tokens(self) -> int:
        """Longest answer, inserted tokens included."""
        return self.thinking_tokens + len(self.end_of_think) + len(self.answer_open) + self.answer_tokens


class Writing:
    """One answer in the making.

    Attributes:
        tokens: ids so far, inserted ones included: what follows the prompt in the next call of the engine.
        logprobs: of each token, 0 for inserted ones.
        inserted: of each token, whether it was put in.
        budget: tokens that may be sampled next; 0: the answer is complete.
        finish: how it ended; None while it is not complete.
        forced: whether thinking was closed by force.
        given_up: whether the engine ended it before its time.
    """

    def __init__(self, rule: ForceRule | int) -> None:
        """Args: `rule`, or the longest answer in tokens where nothing is forced."""
        self._rule = rule if isinstance(rule, ForceRule) else None
        self._thinking = self._rule is not None
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.inserted: list[bool] = []
        self.budget = rule.thinking_tokens if isinstance(rule, ForceRule) else rule
        self.finish: Finish | None = None
        self.forced = self.given_up = False

    def add(self, tokens: Sequence[int], logprobs: Sequence[float], *, stopped: bool = False) -> None:
        """Take in what the engine sampled after `tokens`.

        An engine that was asked for the whole thinking budget may run past the answer's: what is beyond is cut off.

        Args:
            tokens: at most `budget` ids.
            logprobs: one for each.
            stopped: the last of them is a stop token.

        Raises:
            ValueError: the answer is complete, more tokens than were allowed, or not one log-probability for each.
        """
        if self.finish is not None or len(tokens) > self.budget or len(tokens) != len(logprobs):
            raise ValueError(
                f"{len(tokens)} tokens and {len(logprobs)} log-probabilities for an answer that takes {self.budget} more"
            )
        for place, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            self._append(int(token), float(logprob), inserted=False)
            self.budget -= 1
            if stopped and place == len(tokens) - 1:
                self.end("stop")
                return
            if self._thinking and self._rule is not None and self._closes(self._rule.end_of_think):
                self._thinking, self.budget = False, self._rule.answer_tokens
            if not self.budget:
                self._run_out()
                return

    def end(self, finish: Finish, *, given_up: bool = False) -> None:
        """End the answer as it is: before a token of pixels or given up by the engine (abort), or out of context (length)."""
        self.finish, self.given_up, self.budget = finish, given_up, 0

    def rollout(self, text: str, weights_version: int = 0) -> Rollout:
        """The complete answer.

        Raises:
            ValueError: it is not complete.
        """
        if self.finish is None:
            raise ValueError("the answer is not complete")
        return Rollout(
            tokens=np.array(self.tokens, dtype=np.int64),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            inserted=np.array(self.inserted, dtype=np.bool_),
            finish=self.finish,
            text=text,
            weights_version=weights_version,
            given_up=self.given_up,
        )

    def _append(self, token: int, logprob: float, *, inserted: bool) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.inserted.append(inserted)

    def _closes(self, ending: tuple[int, ...]) -> bool:
        return tuple(self.tokens[-len(ending) :]) == ending

    def _run_out(self) -> None:
        """A budget is spent: that of the thinking is followed by the answer's, that of the answer by nothing."""
        if not self._thinking or self._rule is None:
            self.end("length")
            return
        for token in (*self._rule.end_of_think, *self._rule.answer_open):
            self._append(token, 0.0, inserted=True)
        self._thinking, self.forced, self.budget = False, True, self._rule.answer_tokens
