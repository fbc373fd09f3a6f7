"""Answers become rows: every value stands at its label, and the gradient is the batch's, however they are packed and dealt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_glmv.config.model import ModelConfig
from megatron_glmv.config.rl import AlgorithmConfig
from megatron_glmv.plan.flops import training_flops
from megatron_glmv.rl.advantage import group_advantages
from megatron_glmv.rl.batch import PolicySample, Skipped, build_row, compute_loads, describe_plan, divide, make_samples
from megatron_glmv.rl.loss import policy_loss
from megatron_glmv.rl.repack import plan_rows
from megatron_glmv.rl.types import Answer, Group, Prompt, Rollout, Task
from megatron_glmv.sequence.shard import context_indices
from tests.rl.groups import make_group, make_reward, make_rollout

SHAPE = ModelConfig(preset="digits").shape
IDS = SHAPE.tokens
CONFIG = AlgorithmConfig(importance_cap=1.3)
FRAMES = ((4, 6), (2, 4))


def make_prompt(key: str, number: int) -> Prompt:
    """A prompt with two, one or no pictures whose patches hold its number."""
    frames, tokens = FRAMES[: number % 3], [20 + number % 5]
    for rows, columns in frames:
        tokens += [IDS.image_start, *[IDS.image] * (rows * columns // 4), IDS.image_end]
    patches = sum(rows * columns for rows, columns in frames)
    pixels = torch.full((patches, 6), number, dtype=torch.uint8) if frames else None
    return Prompt(Task(key, "math", "", ""), np.array([*tokens, 31, 32]), frames, pixels)


def make_groups(count: int = 6, size: int = 4) -> list[Group]:
    """Groups with masked, forced and all-right answers of various lengths."""
    random, groups = np.random.default_rng(0), []
    for number in range(count):
        answers = []
        for member in range(size):
            length = int(random.integers(2, 30))
            inserted = range(1, length - 1, 3) if (number + member) % 3 == 0 else ()
            value = None if (number, member) == (1, 2) else float(random.integers(0, 2)) if number != 3 else 1.0
            answers.append(Answer(make_rollout(length, inserted, seed=100 * number + member), make_reward(value)))
        groups.append(Group(make_prompt(f"p{number}", number), tuple(answers)))
    return groups


def samples_of(groups: list[Group], row_length: int = 128) -> list[PolicySample]:
    return make_samples(groups, group_advantages(groups, CONFIG), row_length=row_length, image_token=IDS.image)[0]


def row_of(samples: list[PolicySample], length: int, align: int = 1):
    return build_row(samples, length, image_token=IDS.image, pad_token=IDS.pad, align=align)


@pytest.mark.parametrize("align", [1, 8])
def test_values_stand_at_their_labels(align: int):
    samples = samples_of(make_groups())[:5]
    built = row_of(samples, 256, align)
    row, terms = built.row, built.terms
    trained = row.loss_weights > 0
    for sample, (key, start, end) in zip(samples, row.documents, strict=True):
        assert key == sample.key
        places = start + np.flatnonzero(sample.trained) - 1
        assert row.labels[places].tolist() == sample.tokens[sample.trained].tolist()
        assert terms.engine_logprobs[places].tolist() == sample.engine_logprobs[sample.trained].tolist()
        assert (terms.advantages[places] == np.float32(sample.advantage)).all()
        assert row.loss_weights[places].numpy() == pytest.approx(1 / sample.trained.sum())
        assert trained[start:end].sum() == sample.trained.sum()
        assert terms.ends[start:end].nonzero().flatten().tolist() == [places[-1] - start]
    assert float(row.loss_weights.sum()) == pytest.approx(len(samples))
    assert int(terms.ends.sum()) == len(samples)
    assert not trained[row.documents[-1][2] :].any()


def test_pictures_travel_with_their_answers():
    samples = samples_of(make_groups())
    chosen = [samples[index] for index in (12, 0, 5, 10)]
    row = row_of(chosen, 256).row
    frames = [frame for sample in chosen for frame in sample.frames]
    assert row.frames.tolist() == [list(frame) for frame in frames]
    expected = [int(sample.patches[0, 0]) for sample in chosen for _ in range(sample.num_patches)]
    assert row.patches[:, 0].tolist() == expected
    assert len(row.patches) == row.num_patches
    assert len(row.visual_index) * 4 == row.num_patches
    without = [PolicySample(**{**vars(sample), "patches": None}) for sample in chosen]
    assert row_of(without, 256).row.patches is None


def test_what_cannot_be_trained_is_counted():
    def answer(rollout: Rollout) -> Answer:
        return Answer(rollout, make_reward(1.0))

    placeholder = make_rollout(4)
    placeholder.tokens[2] = IDS.image
    group = Group(
        make_prompt("p", 0),
        (
            Answer(make_rollout(4), make_reward(None)),
            answer(make_rollout(0)),
            answer(make_rollout(2, (0, 1))),
            answer(make_rollout(30)),
            answer(make_rollout(29)),
            answer(placeholder),
        ),
    )
    advantages = group_advantages([group], CONFIG)
    samples, skipped = make_samples([group], advantages, row_length=32, image_token=IDS.image)
    assert [sample.key for sample in samples] == ["p#4"]
    assert skipped == Skipped(masked=1, empty=2, too_long=1, visual=1)
    aligned, _ = make_samples([group], advantages, row_length=31, image_token=IDS.image, align=8)
    assert aligned == []


def test_a_row_without_answers_is_padding():
    built = row_of([], 64)
    assert built.row.num_useful == 0
    logprobs = torch.full((1, 64), -1.0, requires_grad=True)
    result = policy_loss(logprobs, built.row.loss_weights[None], built.terms.at(torch.arange(64)), CONFIG)
    result.losses.sum().backward()
    assert int(result.num_answers) == 0
    assert (logprobs.grad == 0).all()


def gradient(
    samples: list[PolicySample], *, num_ranks: int, length: int, align: int = 1, context: int = 1
) -> tuple[float, Tensor]:
    """Loss and gradient of a toy policy by plan, rows and context ranks, divided once.

    The toy sees the position in the document alone, so inserted tokens can have an effect only through the loss itself.
    """
    random = torch.Generator().manual_seed(0)
    table = torch.randn(256, 6, generator=random, dtype=torch.float64)
    head = (0.3 * torch.randn(6, SHAPE.text.vocab_size, generator=random, dtype=torch.float64)).requires_grad_()
    loads = compute_loads(SHAPE, samples)
    plan = plan_rows([len(s.tokens) for s in samples], loads, num_ranks=num_ranks, row_length=length, align=align)
    total, count = 0.0, 0
    for indexes in (row for rank in plan for row in rank):
        built = row_of([samples[index] for index in indexes], length, align)
        for context_rank in range(context):
            local = context_indices(built.row.document_lengths, context, context_rank)
            logprobs = torch.log_softmax(table[built.row.positions[0, local]] @ head, -1)
            logprobs = logprobs.gather(1, built.row.labels[local][:, None]).T
            terms = built.terms.at(local)
            # Old log-probabilities near the current ones, by token: some ratios are clipped and some are not.
            terms = terms.with_old(logprobs.detach() + 0.3 * torch.sin(built.row.labels[local].double()))
            result = policy_loss(logprobs, built.row.loss_weights[local][None], terms, CONFIG)
            result.losses.sum().backward()
            total, count = total + float(result.losses.detach().sum()), count + int(result.num_answers)
    assert count == len(samples)
    return total / count, head.grad / count


def test_packing_ranks_and_context_leave_the_gradient():
    """In float64, sums in another order: worst seen 4e-16 relative. Weights are the same float32 numbers in every row."""
    samples = samples_of(make_groups(), row_length=64)
    loss, whole = gradient(samples, num_ranks=1, length=2048)
    assert float(whole.norm()) > 0
    for layout in (
        {"num_ranks": 1, "length": 64},
        {"num_ranks": 2, "length": 64},
        {"num_ranks": 7, "length": 96, "align": 8},
        {"num_ranks": 40, "length": 128},
        {"num_ranks": 2, "length": 128, "align": 4, "context": 2},
    ):
        other_loss, other = gradient(samples, **layout)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert float((other - whole).norm() / whole.norm()) < 1e-6


def test_inserted_tokens_leave_the_gradient():
    samples = samples_of(make_groups(), row_length=64)
    loss, whole = gradient(samples, num_ranks=2, length=64)
    changed = []
    for sample in samples:
        inserted = ~sample.trained & (np.arange(len(sample.tokens)) > sample.trained.argmax())
        tokens, engine = np.where(inserted, 299, sample.tokens), np.where(sample.trained, sample.engine_logprobs, np.nan)
        changed.append(PolicySample(**{**vars(sample), "tokens": tokens, "engine_logprobs": engine}))
    assert any((one.tokens != two.tokens).any() for one, two in zip(samples, changed, strict=True))
    other_loss, other = gradient(changed, num_ranks=2, length=64)
    assert other_loss == loss
    assert torch.equal(other, whole)


def test_groups_of_equal_rewards_have_no_gradient():
    groups = [make_group([1.0, 1.0, 1.0], "a"), make_group([0.0, None, 0.0], "b"), make_group([None, 1.0], "c")]
    loss, whole = gradient(samples_of(groups), num_ranks=2, length=64)
    assert loss == 0.0
    assert (whole == 0).all()


def test_report_of_a_plan():
    samples = samples_of(make_groups(12), row_length=64)
    lengths, loads = [len(sample.tokens) for sample in samples], compute_loads(SHAPE, samples)
    assert len(loads) == len(samples)
    assert (loads > 0).all()
    plan = plan_rows(lengths, loads, num_ranks=3, row_length=256)
    report = describe_plan(plan, samples, SHAPE, row_length=256)
    assert report.micro_steps == len(plan[0])
    assert report.padded_micro_steps == -(-len(samples) // 3)
    assert report.micro_steps < report.padded_micro_steps / 3
    assert report.fill == pytest.approx(sum(lengths) / (3 * report.micro_steps * 256))
    assert 1 <= report.compute_skew < 1.01
    assert 1 <= report.token_skew < 1.2
    one_sided = (tuple(row for rank in plan for row in rank), *[((),) * (3 * report.micro_steps)] * 2)
    assert describe_plan(one_sided, samples, SHAPE, row_length=256).token_skew == 3.0


def test_pictures_and_long_answers_weigh_more():
    def sample(length: int, frames: tuple[tuple[int, int], ...] = ()) -> PolicySample:
        return PolicySample(
            "", np.zeros(length, np.int64), np.ones(length, np.bool_), 0.0, np.zeros(length, np.float32), frames
        )

    text, pictured, long = compute_loads(SHAPE, [sample(100), sample(100, FRAMES), sample(200)])
    assert pictured > text
    assert long > 2 * text


def test_trained_tokens_alone_count_behind_the_last_attention():
    samples = samples_of(make_groups(3), row_length=64)
    every = [PolicySample(**{**vars(sample), "trained": np.ones(len(sample.tokens), np.bool_)}) for sample in samples]
    token = training_flops(SHAPE, [1], []).total - training_flops(SHAPE, [1], [], trained=0).total
    untrained = np.array([len(sample.tokens) - int(sample.trained.sum()) for sample in samples])
    assert (untrained > 0).all()
    assert compute_loads(SHAPE, every) - compute_loads(SHAPE, samples) == pytest.approx(untrained * token)

    def work(sample: PolicySample) -> float:
        lengths, trained = [len(sample.tokens)], int(sample.trained.sum())
        padding = training_flops(SHAPE, [1], [], trained=0).total * (64 - lengths[0])
        return training_flops(SHAPE, lengths, sample.frames, trained=trained).total + padding

    skew = describe_plan((((0,),), ((1,),)), samples, SHAPE, row_length=64).compute_skew
    two = [work(sample) for sample in samples[:2]]
    assert skew == pytest.approx(2 * max(two) / sum(two))


def test_several_updates_share_the_groups():
    groups = make_groups(7)
    parts = divide(groups, 3)
    assert [len(part) for part in parts] == [3, 2, 2]
    assert sorted(group.prompt.task.key for part in parts for group in part) == [f"p{number}" for number in range(7)]
    assert [len(part) for part in divide(groups[:2], 4)] == [1, 1]
    assert divide([], 2) == []
