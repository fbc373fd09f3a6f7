"""From responses to rewards: processes for gates and rules, threads for the judge, one result for each response.

The trainer hands responses over while the engine still samples others: judging overlaps with the rollout.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from megatron_glmv.config.rewards import JudgedConfig, RewardsConfig
from megatron_glmv.rl.rewards.judge import Judge, RewardModel, load_prompts
from megatron_glmv.rl.rewards.pool import VerifierPool
from megatron_glmv.rl.rewards.tally import Tally
from megatron_glmv.rl.rewards.verifiers.base import Question
from megatron_glmv.rl.types import Reward, Task


class Rewarder:
    """Judges responses.

    Args:
        config: gates, domains, judge, reward model, processes.

    Raises:
        ConfigError: a judge's prompt cannot be used, or its token is not set.
    """

    def __init__(self, config: RewardsConfig) -> None:
        judged = [settings for settings in config.domains.values() if isinstance(settings, JudgedConfig)]
        prompts = load_prompts({settings.prompt for settings in judged if settings.prompt is not None})
        self._config = config
        self._judge = Judge(config.judge, prompts) if config.judge is not None else None
        self._model = RewardModel(config.reward_model) if config.reward_model is not None else None
        self._askers = {
            asked: ThreadPoolExecutor(client.concurrency, thread_name_prefix="judge")
            for asked, client in ((self._judge, config.judge), (self._model, config.reward_model))
            if asked is not None and client is not None
        }
        self._pool = VerifierPool(config)

    def submit(self, task: Task, text: str) -> Future[Reward]:
        """Judge one response; returns at once.

        Args:
            task: what was asked.
            text: the response as sampled, special tokens kept.

        Returns:
            Its reward, when it is known. It holds an exception only where the program is at fault.
        """
        result: Future[Reward] = Future()
        self._pool.submit(task, text, lambda verified: self._continue(verified, result))
        return result

    def _continue(self, verified: Future[Reward | Question], result: Future[Reward]) -> None:
        """After the rules: done, or on to whoever can say."""
        if verified.cancelled():
            result.cancel()
            return
        error = verified.exception()
        if error is not None:
            result.set_exception(error)
            return
        outcome = verified.result()
        asked = None
        if isinstance(outcome, Question):
            asked = self._model if outcome.scored and self._model is not None else self._judge
            if asked is None:
                result.set_result(outcome.without)
                return
            self._askers[asked].submit(_ask, asked, outcome, result)
            return
        result.set_result(outcome)

    def score(self, responses: Iterable[tuple[Task, str]]) -> list[Reward]:
        """Judge a batch.

        Args:
            responses: pairs of task and response.

        Returns:
            Their rewards, in order.

        Raises:
            TooManyMasked: more than `max_masked_share` of them could not be judged.
        """
        tally = Tally()
        waiting = [(task.domain, self.submit(task, text)) for task, text in responses]
        rewards = []
        for domain, future in waiting:
            rewards.append(future.result())
            tally.add(domain, rewards[-1])
        tally.check(self._config.max_masked_share)
        return rewards

    def meters(self) -> dict[str, float]:
        """What asking has cost so far: judge/requests, judge/cost, reward_model/seconds, ..."""
        asked = {"judge": self._judge, "reward_model": self._model}
        return {
            f"{name}/{key}": value
            for name, client in asked.items()
            if client is not None
            for key, value in client.client.meter.as_dict().items()
        }

    def close(self, *, finish: bool = True) -> None:
        """End processes and connections; `finish`: after what was submitted, else at once, and what waits is cancelled."""
        self._pool.close(finish=finish)
        for asked, threads in self._askers.items():
            threads.shutdown(wait=finish, cancel_futures=not finish)
            asked.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(finish=kind is None)


def _ask(asked: Judge | RewardModel, question: Question, result: Future[Reward]) -> None:
    try:
        result.set_result(asked.ask(question))
    except Exception as error:  # noqa: BLE001 - a fault of ours is masked and counted too; its text could hold a header
        result.set_result(Reward(None, None, "error", f"asking the judge: {type(error).__name__}"))
