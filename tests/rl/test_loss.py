"""The policy loss is the one on paper, whatever rows, micro-steps and ranks its answers are dealt to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_glmv.config.rl import AlgorithmConfig
from megatron_glmv.rl.loss import PolicyTerms, merge_stats, policy_loss, summarize

HIDDEN, VOCABULARY = 8, 11
EVERYTHING = AlgorithmConfig(
    clip_low=0.1, clip_high=0.2, dual_clip=1.5, kl_coefficient=0.3, entropy_coefficient=0.05, importance_cap=1.1
)


def make_answers(seed: int, count: int = 9, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Answers as hidden states of a toy policy (logits = states @ head), some tokens prompt or inserted, ratios around 1."""
    random = torch.Generator().manual_seed(seed)
    answers = []
    for number in range(count):
        length = int(torch.randint(4, 14, (1,), generator=random))
        old = -2 + 0.5 * torch.randn(length, generator=random, dtype=dtype)
        trained = torch.rand(length, generator=random) > 0.4
        trained[-2] = True
        answers.append(
            {
                "states": torch.randn(length, HIDDEN, generator=random, dtype=dtype),
                "labels": torch.randint(VOCABULARY, (length,), generator=random),
                "trained": trained,
                "advantage": torch.tensor((-1.5, 0.7, 2.0)[number % 3], dtype=dtype),
                "old": old,
                "engine": old + 0.2 * torch.randn(length, generator=random, dtype=dtype),
                "reference": old + 0.3 * torch.randn(length, generator=random, dtype=dtype),
            }
        )
    return answers


def new_head(dtype: torch.dtype = torch.float64) -> Tensor:
    head = 0.5 * torch.randn(HIDDEN, VOCABULARY, generator=torch.Generator().manual_seed(5), dtype=dtype)
    return head.requires_grad_()


def reference_loss(head: Tensor, answers: list[dict[str, Tensor]], config: AlgorithmConfig) -> Tensor:
    """The objective token by token, as it is written on paper."""
    total = torch.zeros((), dtype=head.dtype)
    for answer in answers:
        mean = torch.zeros((), dtype=head.dtype)
        for t in range(len(answer["labels"])):
            if not answer["trained"][t]:
                continue
            distribution = torch.log_softmax(answer["states"][t] @ head, -1)
            new, old, engine, other = (
                distribution[answer["labels"][t]],
                answer["old"][t],
                answer["engine"][t],
                answer["reference"][t],
            )
            ratio, advantage = torch.exp(new - old), answer["advantage"]
            clipped = torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high)
            objective = torch.min(ratio * advantage, clipped * advantage)
            if config.dual_clip is not None and advantage < 0:
                objective = torch.max(objective, config.dual_clip * advantage)
            if config.importance_cap is not None:
                objective = objective * min(torch.exp(old - engine), torch.tensor(config.importance_cap, dtype=head.dtype))
            objective = objective - config.kl_coefficient * (torch.exp(other - new) - (other - new) - 1)
            objective = objective - config.entropy_coefficient * (distribution.exp() * distribution).sum()
            mean = mean - objective / answer["trained"].sum()
        total = total + mean / len(answers)
    return total


def packed_row(answers: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor, PolicyTerms]:
    """States, labels, weights and terms of answers end to end, with padding that holds nonsense."""
    columns: dict[str, list[Tensor]] = {}
    dtype = answers[0]["old"].dtype if answers else torch.float64
    for answer in answers:
        length, trained = len(answer["labels"]), answer["trained"]
        ends = torch.zeros(length, dtype=torch.bool)
        ends[trained.nonzero()[-1]] = True
        old, engine, other = (torch.where(trained, answer[name], torch.nan) for name in ("old", "engine", "reference"))
        values = (answer["states"], answer["labels"], trained / trained.sum().to(dtype), answer["advantage"].expand(length))
        names = ("states", "labels", "weights", "advantages", "old_logprobs", "engine_logprobs", "reference_logprobs", "ends")
        for name, value in zip(names, (*values, old, engine, other, ends), strict=True):
            columns.setdefault(name, []).append(value)
    padding = {"states": torch.full((3, HIDDEN), 7.0, dtype=dtype), "labels": torch.zeros(3, dtype=torch.long)}
    blank = {
        name: torch.full((3,), math.inf) for name in ("advantages", "old_logprobs", "engine_logprobs", "reference_logprobs")
    }
    blank |= {"weights": torch.zeros(3), "ends": torch.ones(3, dtype=torch.bool)}
    row = {name: torch.cat([*columns.get(name, []), value]) for name, value in (padding | blank).items()}
    states, labels, weights = (row.pop(name) for name in ("states", "labels", "weights"))
    return states, labels, weights.to(dtype)[None], PolicyTerms(**{name: value[None] for name, value in row.items()})


def packed_gradient(rows: list[list[dict[str, Tensor]]], config: AlgorithmConfig) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient and report of a batch in rows, summed row by row and divided once, as Megatron's schedule does."""
    head, total, count, stats = new_head(), 0.0, 0, []
    for answers in rows:
        states, labels, weights, terms = packed_row(answers)
        distribution = torch.log_softmax(states @ head, -1)
        logprobs = distribution.gather(1, labels[:, None]).T
        entropy = -(distribution.exp() * distribution).sum(-1)[None]
        result = policy_loss(logprobs, weights, terms, config, entropy)
        result.losses.sum().backward()
        total, count = total + float(result.losses.detach().sum()), count + int(result.num_answers)
        stats.append(result.stats)
    assert head.grad is not None
    return total / count, head.grad / count, summarize(merge_stats(stats))


@pytest.mark.parametrize(
    "config", [AlgorithmConfig(), AlgorithmConfig(clip_low=0.05, clip_high=0.1, dual_clip=1.2), EVERYTHING]
)
def test_loss_and_gradient_are_those_on_paper(config: AlgorithmConfig):
    answers, head = make_answers(0), new_head()
    expected = reference_loss(head, answers, config)
    expected.backward()
    loss, gradient, report = packed_gradient([answers], config)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, head.grad, rtol=1e-10, atol=1e-14)
    assert report["loss"] == pytest.approx(loss)
    assert report["clip_share_low"] > 0
    assert report["clip_share_high"] > 0
    assert (report["clip_share_dual"] > 0) == (config.dual_clip is not None)
    assert report["answers"] == len(answers)


def test_float32_differs_by_rounding_only():
    """Worst of 20 seeds 6e-7 of the largest gradient; 5e-6 leaves an eightfold."""
    config = EVERYTHING
    _, exact, _ = packed_gradient([make_answers(1)], config)
    head = new_head().detach().float().requires_grad_()
    answers = [{n: v.float() if v.is_floating_point() else v for n, v in answer.items()} for answer in make_answers(1)]
    states, labels, weights, terms = packed_row(answers)
    distribution = torch.log_softmax(states @ head, -1)
    entropy = -(distribution.exp() * distribution).sum(-1)[None]
    result = policy_loss(distribution.gather(1, labels[:, None]).T, weights, terms, config, entropy)
    (result.losses.sum() / result.num_answers).backward()
    assert float((head.grad.double() - exact).abs().max() / exact.abs().max()) < 5e-6


@pytest.mark.parametrize("sizes", [[1] * 9, [4, 5], [2, 0, 7], [0, 0, 3, 3, 3, 0]])
def test_rows_micro_steps_and_ranks_do_not_change_the_gradient(sizes: list[int]):
    """A row is a micro-step of some rank; gradients and counts are sums over all of them, and empty rows add nothing."""
    answers = make_answers(2)
    whole_loss, whole, report = packed_gradient([answers], EVERYTHING)
    order = [8, 3, 1, 0, 5, 2, 7, 6, 4]
    taken = iter(order)
    loss, gradient, parts = packed_gradient([[answers[next(taken)] for _ in range(size)] for size in sizes], EVERYTHING)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert float((gradient - whole).norm() / whole.norm()) < 1e-6
    assert parts == pytest.approx(report)


def test_context_ranks_share_a_row():
    """An answer that two ranks share is counted once, by the rank with its last trained token."""
    answers = make_answers(3)
    _, labels, weights, terms = packed_row(answers)
    logprobs = torch.linspace(-3, -1, len(labels), dtype=torch.float64)[None]
    whole = policy_loss(logprobs, weights, terms, AlgorithmConfig())
    mine = torch.arange(len(labels)) % 3 == 0
    parts = [
        policy_loss(logprobs[:, index], weights[:, index], terms.at(index), AlgorithmConfig())
        for index in (mine.nonzero().flatten(), (~mine).nonzero().flatten())
    ]
    assert sum(int(part.num_answers) for part in parts) == int(whole.num_answers) == len(answers)
    assert float(sum(part.losses.sum() for part in parts)) == pytest.approx(float(whole.losses.sum()))
    assert summarize(merge_stats([part.stats for part in parts])) == pytest.approx(summarize(whole.stats))


def test_what_is_not_trained_has_no_effect():
    """Inserted and prompt tokens: not their policy's value, not their stored values, not a value that is not finite."""
    answers = make_answers(4)
    _, _, weights, terms = packed_row(answers)
    random = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(weights.shape, generator=random, dtype=torch.float64) * 4
    results = []
    for other in (0.0, -50.0, math.nan, -math.inf):
        changed = torch.where(weights > 0, logprobs, other).requires_grad_()
        result = policy_loss(changed, weights, terms, EVERYTHING, torch.where(weights > 0, 1.0, other))
        result.losses.sum().backward()
        assert (changed.grad[weights == 0] == 0).all()
        results.append((result.losses.detach(), changed.grad, result.stats.sums))
    for losses, gradient, sums in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(gradient, results[0][1])
        assert torch.equal(sums, results[0][2])


def test_zero_advantages_give_exactly_zero():
    _, _, weights, terms = packed_row(make_answers(6))
    terms.advantages[...] = 0.0
    logprobs = torch.full(weights.shape, -40.0, requires_grad=True)
    result = policy_loss(logprobs, weights, terms, AlgorithmConfig())
    result.losses.sum().backward()
    assert (result.losses == 0).all()
    assert (logprobs.grad == 0).all()
    assert int(result.num_answers) == 9


def test_report_of_the_clipping():
    """Of good and bad tokens of various ratios, two are held above and one below, and dual clipping holds the worst."""
    ratio = torch.tensor([[2.0, 1.5, 0.5, 0.5, 2.0, 2.0, 5.0, 1.0]])
    advantages = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0, 0.0, -1.0, -1.0]])
    old = torch.full_like(ratio, -3.0)
    terms = PolicyTerms(advantages, old, old, torch.zeros_like(ratio, dtype=torch.bool))
    result = policy_loss(old + ratio.log(), torch.full_like(ratio, 1 / 8), terms, AlgorithmConfig(dual_clip=3.0))
    assert (result.losses * 8)[0].tolist() == pytest.approx([-1.28, -1.28, -0.5, 0.8, 2.0, 0.0, 3.0, 1.0], rel=1e-6)
    report = summarize(result.stats)
    assert (report["clip_share_high"], report["clip_share_low"], report["clip_share_dual"]) == (2 / 8, 1 / 8, 1 / 8)
    assert report["ratio_mean"] == pytest.approx(14.5 / 8)
    assert report["ratio_max"] == pytest.approx(5.0)
    assert report["advantage_mean"] == pytest.approx(-1 / 8)
    assert report["kl_old"] == pytest.approx(float((1 / ratio - 1 + ratio.log()).mean()))


def test_report_of_the_gap_to_the_engine():
    size = 1000
    old = torch.full((1, size), -1.0)
    gaps = torch.full((1, size), 1e-4)
    gaps[0, :15] = 0.5
    gaps[0, 0] = 3.0
    terms = PolicyTerms(torch.ones(1, size), old, old - gaps, torch.zeros(1, size, dtype=torch.bool))
    stats = policy_loss(old, torch.full((1, size), 1 / size), terms, AlgorithmConfig(importance_cap=1.2)).stats
    report = summarize(merge_stats([stats, merge_stats([])]))
    assert report["gap_mean"] == pytest.approx(float(gaps.mean()), rel=1e-4)
    assert report["gap_max"] == pytest.approx(3.0, rel=1e-6)
    assert 0.5 <= report["gap_p99"] <= 0.5 * 10**0.1
    assert report["importance_capped_share"] == pytest.approx(0.015)
    assert report["ratio_mean"] == report["ratio_max"] == 1.0
    assert report["kl_old"] == 0.0
    assert set(summarize(merge_stats([])).values()) == {0.0}


@pytest.mark.parametrize("config", [AlgorithmConfig(kl_coefficient=0.1), AlgorithmConfig(entropy_coefficient=0.1)])
def test_a_term_without_its_input_is_refused(config: AlgorithmConfig):
    one = torch.ones(1, 2)
    with pytest.raises(ValueError, match="above 0"):
        policy_loss(one, one, PolicyTerms(one, one, one, one > 0), config)
