"""Small groups of answers with given rewards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_glmv.rl.types import Answer, Group, Prompt, Reward, Rollout, Task


def make_rollout(length: int = 4, inserted: Sequence[int] = (), seed: int = 0) -> Rollout:
    random = np.random.default_rng([seed, length])
    marks = np.zeros(length, dtype=np.bool_)
    marks[list(inserted)] = True
    logprobs = np.where(marks, 0, -random.random(length)).astype(np.float32)
    return Rollout(random.integers(30, 300, length), logprobs, marks, "stop", "")


def make_reward(value: float | None) -> Reward:
    if value is None:
        return Reward(None, None, "error")
    return Reward(value, value >= 1, "right" if value >= 1 else "wrong")


def make_group(values: Sequence[float | None], key: str = "p", domain: str = "math", subcategory: str = "") -> Group:
    """One group whose answers have these rewards; 1 is right."""
    prompt = Prompt(Task(key, domain, "", "", subcategory), np.arange(30, 36))
    return Group(prompt, tuple(Answer(make_rollout(), make_reward(value)) for value in values))
