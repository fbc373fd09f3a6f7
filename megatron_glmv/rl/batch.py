"""From judged groups to the rows that the training step runs: answers as documents, dealt to data ranks and packed.

Everything per token is kept by the token it is about and shifted to labels in one place, `build_row`, exactly as
`sequence.packed.pack` shifts loss weights.

Source: arXiv 2507.01006, section 5.4.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_glmv.config.lora import LoraConfig
from megatron_glmv.config.model import ModelShape, Part
from megatron_glmv.plan.flops import training_flops
from megatron_glmv.rl.advantage import GroupAdvantages
from megatron_glmv.rl.loss import PolicyTerms
from megatron_glmv.rl.repack import Plan, skew
from megatron_glmv.rl.types import Group, Prompt, Rollout
from megatron_glmv.sequence.packed import Document, PackedSequence, pack

LENGTH_SHARE = 0.1
"""Part of the work on an answer's tokens that enters its load, though a row's padding would have cost as much: it evens lengths
where compute leaves a choice."""


@dataclass(frozen=True)
class PolicySample:
    """One answer behind its prompt. n = tokens of both.

    Attributes:
        key: prompt's key and number of the answer.
        group: place of its group among those that are trained on.
        tokens: [n] int64.
        trained: [n] bool, sampled tokens of the answer; neither prompt nor inserted tokens.
        advantage: of the answer.
        engine_logprobs: [n] float32, of each token as the engine sampled it; 0 where not trained.
        frames: (rows, columns) in patches of every frame.
        patches: [N, patch_dim], or None on ranks that do not run the vision tower.
    """

    key: str
    tokens: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]
    advantage: float
    engine_logprobs: npt.NDArray[np.float32]
    frames: tuple[tuple[int, int], ...] = ()
    patches: Tensor | None = None
    group: int = 0

    @property
    def num_trained(self) -> int:
        """Tokens that are trained."""
        return int(np.count_nonzero(self.trained))

    @property
    def num_patches(self) -> int:
        """Patches of all frames."""
        return sum(rows * columns for rows, columns in self.frames)


@dataclass(frozen=True)
class Skipped:
    """Answers that are not trained on.

    Attributes:
        masked: their verifier could not say.
        empty: no token was sampled.
        too_long: longer than a row together with their prompt.
        visual: the model wrote a placeholder of a picture, for which there is none.
    """

    masked: int = 0
    empty: int = 0
    too_long: int = 0
    visual: int = 0


@dataclass(frozen=True)
class PolicyRow:
    """One micro-step: the row as the model reads it, and what the loss reads of it ([S], by label)."""

    row: PackedSequence
    terms: PolicyTerms


@dataclass(frozen=True)
class RepackReport:
    """How well answers were packed and dealt.

    Attributes:
        micro_steps: of every rank.
        padded_micro_steps: those of one answer a row.
        fill: share of the rows' tokens that are not padding.
        token_skew: most tokens of a rank over the mean.
        compute_skew: most operations of a rank over the mean, padding included, because the devices compute it.
    """

    micro_steps: int
    padded_micro_steps: int
    fill: float
    token_skew: float
    compute_skew: float


def make_samples(
    groups: Sequence[Group], advantages: GroupAdvantages, *, row_length: int, image_token: int, align: int = 1
) -> tuple[list[PolicySample], Skipped]:
    """Every answer that can be trained on, in the order of groups and answers.

    An answer of advantage 0 is one of them: it has no gradient, but it is part of the mean.

    Args:
        groups: to train on.
        advantages: of the same groups.
        row_length: longest prompt with answer, in tokens rounded up to a multiple of `align`.
        image_token: id of the visual placeholder.
        align: documents are padded to a multiple of this.
    """
    samples, counts = [], dict.fromkeys(("masked", "empty", "too_long", "visual"), 0)
    for place, (group, values) in enumerate(zip(groups, advantages.values, strict=True)):
        for number, (answer, advantage) in enumerate(zip(group.answers, values, strict=True)):
            rollout = answer.rollout
            length = len(group.prompt.tokens) + len(rollout.tokens)
            if advantage is None:
                counts["masked"] += 1
            elif rollout.inserted.all():
                counts["empty"] += 1
            elif -(-length // align) * align > row_length:
                counts["too_long"] += 1
            elif (rollout.tokens == image_token).any():
                counts["visual"] += 1
            else:
                samples.append(replace(_make_sample(group.prompt, rollout, advantage, number), group=place))
    return samples, Skipped(**counts)


def _make_sample(prompt: Prompt, rollout: Rollout, advantage: float, number: int) -> PolicySample:
    if not len(prompt.tokens):
        raise ValueError(f"prompt {prompt.task.key!r} has no tokens, so the first token of its answer cannot be predicted")
    before = len(prompt.tokens)
    return PolicySample(
        key=f"{prompt.task.key}#{number}",
        tokens=np.concatenate((prompt.tokens, rollout.tokens)),
        trained=np.concatenate((np.zeros(before, dtype=np.bool_), ~rollout.inserted)),
        advantage=advantage,
        engine_logprobs=np.concatenate((np.zeros(before, dtype=np.float32), rollout.logprobs)),
        frames=prompt.frames,
        patches=prompt.patches,
    )


def divide(groups: Sequence[Group], updates: int) -> list[list[Group]]:
    """The groups of each of several updates: every `updates`-th, so that updates mix domains alike; fewer of fewer groups."""
    return [list(groups[first::updates]) for first in range(min(updates, len(groups)))]


def compute_loads(
    shape: ModelShape,
    samples: Sequence[PolicySample],
    freeze: Collection[Part] = (),
    lora: LoraConfig | None = None,
) -> npt.NDArray[np.float64]:
    """What each answer adds to its rank's work, for `repack.plan_rows`.

    Both towers' attention, all of the vision tower and the merger, and the decoder's last MLP and the head, which see trained
    tokens alone, count whole; the decoder's other linear layers, for which a row of fixed length pays with or without the
    answer, count by `LENGTH_SHARE`.

    Returns:
        [n] operations, forward and backward.
    """
    loads = []
    for sample in samples:
        part = [len(sample.tokens)], sample.frames, freeze, lora
        whole, untrained = (training_flops(shape, *part, trained) for trained in (sample.num_trained, 0))
        loads.append(whole.total - (1 - LENGTH_SHARE) * untrained.text_linear)
    return np.array(loads, dtype=np.float64)


def describe_plan(
    plan: Plan,
    samples: Sequence[PolicySample],
    shape: ModelShape,
    *,
    row_length: int,
    freeze: Collection[Part] = (),
    lora: LoraConfig | None = None,
) -> RepackReport:
    """Measure a plan."""
    tokens = [sum(len(samples[index].tokens) for row in rank for index in row) for rank in plan]
    padding = training_flops(shape, [1], [], freeze, lora, 0)
    work = []
    for rank, useful in zip(plan, tokens, strict=True):
        own = [samples[index] for row in rank for index in row]
        lengths, frames = [len(sample.tokens) for sample in own], [frame for sample in own for frame in sample.frames]
        flops = training_flops(shape, lengths, frames, freeze, lora, sum(sample.num_trained for sample in own))
        work.append(flops.total + (len(rank) * row_length - useful) * padding.total)
    steps = len(plan[0])
    return RepackReport(
        micro_steps=steps,
        padded_micro_steps=-(-len(samples) // len(plan)),
        fill=sum(tokens) / (len(plan) * steps * row_length),
        token_skew=skew(tokens),
        compute_skew=skew(work),
    )


def build_row(
    samples: Sequence[PolicySample],
    row_length: int,
    *,
    image_token: int,
    pad_token: int,
    align: int = 1,
    merge: int = 2,
    key: str = "",
) -> PolicyRow:
    """Pack answers into one row; no answers give a row of padding, which trains nothing.

    The old log-probabilities are the engine's until the trainer has computed its own (`PolicyTerms.with_old`).

    Raises:
        RowError: the answers are longer than the row, or visual tokens and frames do not match.
    """
    documents = [Document(s.tokens, s.trained / s.trained.sum(), s.frames, s.key) for s in samples]
    pictured = [sample for sample in samples if sample.frames]
    patches = [sample.patches for sample in pictured if sample.patches is not None]
    row = pack(
        documents,
        row_length,
        image_token=image_token,
        pad_token=pad_token,
        align=align,
        merge=merge,
        patches=torch.cat(patches) if patches and len(patches) == len(pictured) else None,
        key=key,
    )
    advantages, engine = np.zeros(row_length, dtype=np.float32), np.zeros(row_length, dtype=np.float32)
    ends = np.zeros(row_length, dtype=np.bool_)
    for sample, (_, start, end) in zip(samples, row.documents, strict=True):
        # Entry t of a row is about its label, the token after t.
        advantages[start : end - 1] = sample.advantage
        engine[start : end - 1] = sample.engine_logprobs[1:]
        ends[start + int(np.flatnonzero(sample.trained)[-1]) - 1] = True
    logprobs = torch.from_numpy(engine)
    return PolicyRow(row, PolicyTerms(torch.from_numpy(advantages), logprobs, logprobs, torch.from_numpy(ends)))
