"""What passes between the parts of reinforcement learning: prompts, the answers to them, and what those are worth.

Source: arXiv 2507.01006, section 5 (groups, tiers, forced answers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # the verifiers' processes read this file and never load torch
    from torch import Tensor

Finish = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Task:
    """What is asked and how an answer is judged, as a data set gives it.

    Attributes:
        key: the sample's name.
        domain: which verifier judges it, and under which name it is counted.
        question: the text of the question, for judges.
        answer: the reference: a string, or what the domain's verifier reads (boxes, an action, a time span).
        subcategory: a finer name for proportions, or "".
        options: settings of the verifier for this sample, over those of the domain.
        media: paths or URLs of the pictures, for judges and for looking at.
    """

    key: str
    domain: str
    question: str
    answer: Any
    subcategory: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    media: tuple[str, ...] = ()


@dataclass(frozen=True)
class MediaFile:
    """A picture or video of a prompt as it is stored, for engines that decode it themselves.

    Attributes:
        kind: which of the two.
        data: the file's bytes, upright as the prompt's patches are.
        extension: of the file, without the dot.
        num_frames: entries of the prompt's frames that it takes.
    """

    kind: Literal["image", "video"]
    data: bytes = field(repr=False)
    extension: str
    num_frames: int = 1


@dataclass(frozen=True)
class Prompt:
    """A task as the model reads it. n = tokens.

    Attributes:
        task: what is asked.
        tokens: [n] int64, chat template applied, visual placeholders expanded, up to where the assistant begins.
        frames: (rows, columns) in patches of every frame, in token order.
        patches: [N, patch_dim] uint8 or float32 pixels of all frames, on ranks that need them.
        files: pictures and videos in token order, on ranks whose engine needs them.
    """

    task: Task
    tokens: npt.NDArray[np.int64]
    frames: tuple[tuple[int, int], ...] = ()
    patches: Tensor | None = None
    files: tuple[MediaFile, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """One answer as an engine sampled it. m = tokens.

    Attributes:
        tokens: [m] int64, the stop token included.
        logprobs: [m] float32, of each token under the engine's policy at the sampling temperature; 0 for inserted tokens.
        inserted: [m] bool, tokens that were not sampled but put in to force an answer; they never enter the loss.
        finish: why it ended.
        text: the tokens as text, special tokens kept.
        weights_version: of the policy that sampled it.
        given_up: the engine ended it before its time (abort), so that it says nothing of the policy. One that is cut before a
            token of pixels, which the policy chose, ends with abort as well and is not given up.
    """

    tokens: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    inserted: npt.NDArray[np.bool_]
    finish: Finish
    text: str
    weights_version: int = 0
    given_up: bool = False


@dataclass(frozen=True)
class Reward:
    """What one answer is worth.

    Attributes:
        value: in [0, 1] or below 0 for what a gate punishes; None where the verifier could not say: such an answer is masked
            and counted, and never becomes a reward.
        correct: whether it counts as right; None where `value` is None.
        reason: a short code: right, wrong, format, hack, timeout, error, judge_down, ...
        detail: more for people, one line.
    """

    value: float | None
    correct: bool | None
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Answer:
    """An answer with its reward."""

    rollout: Rollout
    reward: Reward


@dataclass(frozen=True)
class Group:
    """All answers to one prompt of one iteration."""

    prompt: Prompt
    answers: tuple[Answer, ...]
