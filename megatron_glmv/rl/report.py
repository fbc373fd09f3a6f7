"""What one iteration is worth knowing: numbers by domain for the record, and the line that a person watches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_glmv.rl.expansion import Selection
from megatron_glmv.rl.grading import pass_at_k
from megatron_glmv.rl.loss import summarize
from megatron_glmv.rl.outcome import outcome_of
from megatron_glmv.rl.policy_step import PolicyReport
from megatron_glmv.rl.rollout import Wave
from megatron_glmv.rl.types import Group
from megatron_glmv.run_folder.figures import format_duration


@dataclass(frozen=True)
class Iteration:
    """What one iteration did.

    Attributes:
        step: iterations done, this one included.
        wave: what was rolled out.
        selection: which groups were trained on.
        ratio: of this wave alone.
        ratio_ema: smoothed, for the next wave.
        policy: what the updates did.
        curriculum: `Curriculum.report`, after this wave.
        meters: of the judge, since the run was started.
        seconds: rollout, reward, update, weights, total.
    """

    step: int
    wave: Wave
    selection: Selection
    ratio: float
    ratio_ema: float
    policy: PolicyReport
    curriculum: Mapping[str, float]
    meters: Mapping[str, float]
    seconds: Mapping[str, float]


def record_of(iteration: Iteration) -> dict[str, Any]:
    """Everything that is recorded of an iteration, as a tree of numbers."""
    wave, selection, policy, seconds = iteration.wave, iteration.selection, iteration.policy, iteration.seconds
    num_judged = max(len(wave.groups) - selection.num_unjudged, 1)
    record: dict[str, Any] = {
        "step": iteration.step,
        **describe_groups(wave.groups),
        **by_name(wave.tally.metrics()),
        "expansion": {
            "ratio": iteration.ratio,
            "ratio_ema": iteration.ratio_ema,
            "wave": len(wave.groups),
            "chosen": len(selection.chosen),
            "useful_share": selection.num_useful / num_judged,
            "degenerate": selection.num_degenerate,
            "unjudged": selection.num_unjudged,
            "filled": selection.num_filled,
        },
        "curriculum": dict(iteration.curriculum),
        "response": describe_responses(wave.groups),
        "lost": {"bad_prompts": len(wave.bad_prompts), "unanswered": wave.unanswered, "missing_answers": wave.missing},
        "skipped": asdict(policy.skipped),
        "lr": dict(policy.learning_rates),
        "grad_norm": policy.grad_norm,
        "updates": policy.updates,
        "refused_updates": policy.refused,
        "trained_tokens_with_prompts": policy.tokens,
        "seconds": dict(seconds),
        "share": {name: value / max(seconds["total"], 1e-9) for name, value in seconds.items() if name != "total"},
        "rollout_idle_share": wave.idle_share,
        "judging": dict(iteration.meters),
    }
    if policy.stats is not None:
        record["policy"] = summarize(policy.stats)
    if policy.repack is not None:
        record["repack"] = asdict(policy.repack)
    return record


def describe_groups(groups: Sequence[Group]) -> dict[str, Any]:
    """Of each domain: pass@k for k = 1, 2, 4, ... up to the group's size, and the mean spread of a group's rewards.

    Where prompts have sub-categories, also the accuracy of each, as "domain/subcategory".
    """
    estimates: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    spread: dict[str, list[float]] = defaultdict(list)
    parts: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        domain, outcome = group.prompt.task.domain, outcome_of(group)
        if not outcome.num_judged:
            continue
        spread[domain].append(outcome.spread)
        if group.prompt.task.subcategory:
            parts[f"{domain}/{group.prompt.task.subcategory}"].append(outcome.pass_rate)
        right = round(outcome.pass_rate * outcome.num_judged)
        k = 1
        while k <= outcome.num_judged:
            estimates[f"pass@{k}"][domain].append(pass_at_k(outcome.num_judged, right, k))
            k *= 2
    found: dict[str, Any] = {name: _means(domains) for name, domains in estimates.items()}
    return found | {"group_spread": _means(spread)} | ({"subcategory_accuracy": _means(parts)} if parts else {})


def describe_responses(groups: Sequence[Group]) -> dict[str, float]:
    """Lengths in tokens, and shares of answers that were forced, ran out of tokens, or were given up."""
    rollouts = [answer.rollout for group in groups for answer in group.answers]
    if not rollouts:
        return {}
    lengths = [len(rollout.tokens) for rollout in rollouts]

    def share(holds: Callable[[Any], bool]) -> float:
        return sum(map(holds, rollouts)) / len(rollouts)

    return {
        "tokens_mean": sum(lengths) / len(lengths),
        "tokens_max": max(lengths),
        "forced_share": share(lambda rollout: bool(rollout.inserted.any())),
        "cut_share": share(lambda rollout: rollout.finish == "length"),
        "aborted_share": share(lambda rollout: rollout.finish == "abort"),
    }


def by_name(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """{"reward/math": 0.5} as {"reward": {"math": 0.5}}."""
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        name, _, domain = key.partition("/")
        found.setdefault(name, {})[domain] = value
    return found


def mean(values: Iterable[float]) -> float:
    """Over domains; 0 without any."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def describe(record: Mapping[str, Any], total_steps: int, left_s: float) -> str:
    """A record of `record_of` as the line that a person reads; rewards and accuracies are means over domains."""
    seconds, expansion, policy = record["seconds"], record["expansion"], record.get("policy")
    parts = [
        f"step {record['step']}/{total_steps}",
        f"reward {mean(record.get('reward', {}).values()):.3f}",
        f"accuracy {mean(record.get('accuracy', {}).values()):.1%}",
        f"useful {expansion['useful_share']:.0%} (x{expansion['ratio_ema']:.2f})",
        f"{record['response'].get('tokens_mean', 0):.0f} tokens",
    ]
    if policy is None:
        parts.append("nothing to train on")
    else:
        parts += [f"grad {record['grad_norm']:.2f}", f"entropy {policy['entropy']:.2f}", f"gap {policy['gap_mean']:.1e}"]
    masked = sum(record.get("masked_by", {}).values())
    lost = sum(record["lost"].values()) + sum(record["skipped"].values())
    for count, word in ((masked, "masked"), (lost, "lost"), (record["refused_updates"], "updates refused")):
        if count:
            parts.append(f"{count:.0f} {word}")
    times = ", ".join(f"{name} {seconds[name]:.1f}" for name in ("rollout", "reward", "update", "weights"))
    return " | ".join([*parts, f"{seconds['total']:.1f} s ({times})", f"{format_duration(left_s)} left"])


def _means(domains: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {domain: sum(values) / len(values) for domain, values in sorted(domains.items())}
