"""Pointing with boxes: the share of boxes found, each reference box at most once.

The share is of the longer of the two lists, so that boxes everywhere earn nothing.

Source: arXiv 2507.01006, section 5.2 (boxes with IoU above a threshold / boxes); the threshold is not disclosed. zai-org/GLM-V
8fc9756 has no such verifier.
"""

from __future__ import annotations

from typing import Any, ClassVar

from megatron_glmv.config.rewards import GroundingConfig
from megatron_glmv.rl.rewards.geometry import Box, best_matching, iou, is_box, numbers, read_boxes
from megatron_glmv.rl.rewards.verifiers.base import BadReference, Question, Verifier, wrong
from megatron_glmv.rl.types import Reward, Task

_FOUND = 1_000.0
"""Weight of a found box in the matching, so that their number counts first and their IoU second."""


class GroundingVerifier(Verifier[GroundingConfig]):
    """Boxes in a picture."""

    exact: ClassVar[bool] = False

    def compare(self, task: Task, answer: str) -> Reward | Question:
        """Share of boxes found."""
        settings = self.settings
        reference = _reference(task.answer)
        if reference is None or not all(is_box(box, settings.scale) for box in reference):
            raise BadReference(f"the reference is not boxes [left, top, right, bottom] within 0 to {settings.scale:g}")
        boxes = read_boxes(answer)
        if boxes is None:
            return wrong(detail="not only boxes [left, top, right, bottom]")
        if len(boxes) > settings.max_boxes:
            return wrong("limit", f"{len(boxes)} boxes, more than {settings.max_boxes}")
        if not boxes or not reference:
            return self.continuous(float(len(boxes) == len(reference)))
        overlaps = [[iou(box, other) if is_box(box, settings.scale) else 0.0 for other in reference] for box in boxes]
        weights = [[value + _FOUND * (value >= settings.iou) for value in row] for row in overlaps]
        found = sum(overlaps[row][column] >= settings.iou for row, column in best_matching(weights))
        total = max(len(boxes), len(reference))
        return self.continuous(found / total, f"{found} of {total} boxes")


def _reference(answer: Any) -> list[Box] | None:
    if isinstance(answer, str):
        return read_boxes(answer)
    if (box := numbers(answer, 4)) is not None:
        return [box]  # type: ignore[list-item]
    if not isinstance(answer, list | tuple):
        return None
    boxes = [numbers(box, 4) for box in answer]
    return None if None in boxes else boxes  # type: ignore[return-value]
