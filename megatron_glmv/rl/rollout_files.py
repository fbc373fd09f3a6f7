"""Rollouts kept for people: one JSONL file an iteration, one line a group, pictures by their paths.

`glmv-data inspect` shows them as a page.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from megatron_glmv.rl.advantage import GroupAdvantages
from megatron_glmv.rl.json_lines import as_line
from megatron_glmv.rl.types import Answer, Group

FOLDER = "rollouts"


def rollout_file(run_folder: Path, step: int) -> Path:
    """The file of iteration `step`, counted from 1."""
    return run_folder / FOLDER / f"step_{step:08d}.jsonl"


def write_rollouts(
    path: Path, step: int, groups: Sequence[Group], chosen: Collection[int], advantages: GroupAdvantages, tiers: Sequence[str]
) -> None:
    """Write the groups of one wave; the file is whole or absent.

    Args:
        path: to write.
        step: the iteration, counted from 1.
        groups: all of the wave.
        chosen: places of those that were trained on.
        advantages: of all groups.
        tiers: difficulty of each group's prompt when it was drawn.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for place, (group, values, tier) in enumerate(zip(groups, advantages.values, tiers, strict=True)):
            line = _describe(group, values) | {"step": step, "chosen": place in chosen, "tier": tier}
            file.write(as_line(line) + "\n")
    partial.replace(path)


def _describe(group: Group, advantages: Sequence[float | None]) -> dict[str, Any]:
    task = group.prompt.task
    return {
        "key": task.key,
        "domain": task.domain,
        "subcategory": task.subcategory,
        "question": task.question,
        "answer": task.answer,
        "media": list(task.media),
        "prompt_tokens": len(group.prompt.tokens),
        "answers": [_answer(answer, value) for answer, value in zip(group.answers, advantages, strict=True)],
    }


def _answer(answer: Answer, advantage: float | None) -> dict[str, Any]:
    rollout, reward = answer.rollout, answer.reward
    return {
        "text": rollout.text,
        "tokens": len(rollout.tokens),
        "inserted": int(rollout.inserted.sum()),
        "finish": rollout.finish,
        "weights_version": rollout.weights_version,
        "reward": reward.value,
        "correct": reward.correct,
        "reason": reward.reason,
        "detail": reward.detail,
        "advantage": advantage,
    }
