"""The judge: a language model that compares an answer with its reference, and the reward model that scores without one.

A verdict is one fixed line at the end of the reply; a reply without it, or with two that differ, is asked for again and then
masked. Several endpoints or samples vote.

Source: arXiv 2507.01006, section 5.2 (judge prompts per domain; box tokens so that the judge sees the final answer only).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_glmv.config.base import ConfigError
from megatron_glmv.config.rewards import JudgeConfig, RewardModelConfig
from megatron_glmv.rl.rewards.client import ServerClient, ServerFailed, check_tokens
from megatron_glmv.rl.rewards.verifiers.base import Question
from megatron_glmv.rl.types import Reward

PROMPTS = Path(__file__).with_name("prompts")
PLACEHOLDERS = ("{question}", "{reference}", "{answer}")
_PLACEHOLDER = re.compile(r"\{(question|reference|answer)\}")
_MARKS = re.compile(r"<<<|>>>")
_VERDICT = re.compile(r"^\W*verdict\W+(correct|incorrect)\W*$", re.IGNORECASE | re.MULTILINE)
_SCORE = re.compile(r"^\W*score\W+(\d(?:\.\d{1,6})?)\W*$", re.IGNORECASE | re.MULTILINE)


def load_prompts(others: Iterable[Path] = ()) -> dict[str, str]:
    """All prompts by the name that a question gives: those of rewards/prompts, and `others` by their path.

    Raises:
        ConfigError: a file is missing, or lacks a placeholder.
    """
    prompts = {}
    for name, path in [*((path.stem, path) for path in sorted(PROMPTS.glob("*.txt"))), *((str(path), path) for path in others)]:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: the judge's prompt cannot be read ({type(error).__name__})") from None
        missing = [placeholder for placeholder in PLACEHOLDERS if placeholder not in text]
        if missing:
            raise ConfigError(f"{path}: the judge's prompt lacks {', '.join(missing)}")
        prompts[name] = text
    return prompts


def fill(prompt: str, question: Question) -> str:
    """A prompt with its texts put in, in one pass: what the texts hold is never taken for a placeholder or a mark."""
    texts = {"question": question.question, "reference": question.reference, "answer": question.answer}
    return _PLACEHOLDER.sub(lambda found: _MARKS.sub(" ", texts[found[1]]), prompt)


def read_verdict(text: str, *, graded: bool) -> float:
    """The verdict of a reply: 1 correct, 0 incorrect, or the grade.

    Raises:
        ValueError: there is none, there are two that differ, or the grade is not from 0 to 1.
    """
    text = text.rpartition("</think>")[2]
    found = {value.lower() for value in (_SCORE if graded else _VERDICT).findall(text)}
    if len(found) != 1:
        raise ValueError("no verdict line" if not found else "verdicts that differ")
    value = found.pop()
    grade = float(value) if graded else float(value == "correct")
    if not 0 <= grade <= 1:
        raise ValueError(f"a grade of {grade:g}")
    return grade


def _content(reply: Any) -> str:
    content = reply["choices"][0]["message"]["content"]
    if not isinstance(content, str):
        raise ValueError("no text in the reply")
    return content


class Judge:
    """Asks for verdicts.

    Args:
        config: endpoints, votes, and the rules of asking.
        prompts: by name, as `load_prompts` gives them.

    Raises:
        ConfigError: a token's environment variable is not set.
    """

    def __init__(self, config: JudgeConfig, prompts: Mapping[str, str]) -> None:
        check_tokens(config.endpoints)
        # One of three endpoints may be silent: the others decide.
        self.client = ServerClient(config, waits=len(config.endpoints) < 3)
        self._config = config
        self._prompts = prompts

    def ask(self, question: Question) -> Reward:
        """The reward by the majority of votes, or their mean where grades are asked for; masked where too few votes came in."""
        config = self._config
        votes: list[float] = []
        failures: list[ServerFailed] = []
        total = len(config.endpoints) * config.samples
        for number in range(total):
            try:
                votes.append(self._vote(question, number))
            except ServerFailed as failure:
                failures.append(failure)
            if not question.graded and 2 * max(votes.count(1.0), votes.count(0.0)) > total:
                break
            if 2 * len(failures) >= total:
                return Reward(None, None, f"judge_{failures[-1].reason}", str(failures[-1]))
        if question.graded:
            return _graded(math.fsum(votes) / len(votes), question)
        right, wrong = votes.count(1.0), votes.count(0.0)
        if right == wrong:
            return Reward(None, None, "judge_tie", f"{right} votes for, {wrong} against")
        detail = f"judge: {right} votes for, {wrong} against"
        return Reward(1.0, True, "right", detail) if right > wrong else Reward(0.0, False, "wrong", detail)

    def _vote(self, question: Question, number: int) -> float:
        config = self._config
        endpoint = config.endpoints[number % len(config.endpoints)]
        body = {
            "model": endpoint.model,
            "messages": [{"role": "user", "content": fill(self._prompts[question.prompt], question)}],
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
            "seed": number,
        }
        return self.client.ask(
            endpoint, "/chat/completions", body, number, lambda reply: read_verdict(_content(reply), graded=question.graded)
        )

    def close(self) -> None:
        """Close all connections."""
        self.client.close()


class RewardModel:
    """Asks a server for the score of an answer.

    Args:
        config: its address, the range of its scores, and the rules of asking.

    Raises:
        ConfigError: the token's environment variable is not set.
    """

    def __init__(self, config: RewardModelConfig) -> None:
        check_tokens([config.endpoint])
        self.client = ServerClient(config)
        self._config = config

    def ask(self, question: Question) -> Reward:
        """The reward of a score; masked where none came."""
        endpoint, low, high = self._config.endpoint, self._config.low, self._config.high
        body = {
            "model": endpoint.model,
            "question": question.question,
            "answer": question.answer,
            "reference": question.reference,
            "media": list(question.media),
        }
        try:
            score = self.client.ask(endpoint, "", body, 0, _score)
        except ServerFailed as failure:
            return Reward(None, None, f"reward_model_{failure.reason}", str(failure))
        return _graded(min(max((score - low) / (high - low), 0.0), 1.0), question)

    def close(self) -> None:
        """Close all connections."""
        self.client.close()


def _score(reply: Any) -> float:
    score = reply["score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError("the score is not a number")
    return float(score)


def _graded(value: float, question: Question) -> Reward:
    correct = value >= question.correct_from
    return Reward(value, correct, "right" if correct else "partial" if value > 0 else "wrong", f"graded {value:.3f}")
