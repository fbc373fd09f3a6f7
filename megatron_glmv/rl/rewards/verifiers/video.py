"""Answers about videos: spans of time by their overlap, everything else as short answers.

Source: arXiv 2507.01006, sections 5.1 (temporal grounding instead of captions) and 5.2. zai-org/GLM-V 8fc9756 has no such
verifier.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from megatron_glmv.config.rewards import VideoConfig
from megatron_glmv.rl.rewards.geometry import Span, numbers, span_iou
from megatron_glmv.rl.rewards.verifiers.base import BadReference, Question, wrong
from megatron_glmv.rl.rewards.verifiers.short_answer import ShortAnswerVerifier
from megatron_glmv.rl.types import Reward, Task

_TIME = r"(?:(\d{1,3}):)?(?:(\d{1,3}):)?(\d{1,6}(?:\.\d{1,6})?)\s?(?:seconds|second|sec|s|秒)?"
_TO = r"\s{0,3}(?:-|–|—|~|,|to|until|and|到|至)\s{0,3}"
_SPAN = re.compile(rf"[\[(<]?\s?(?:from\s|从)?第?{_TIME}{_TO}第?{_TIME}\s?[\])>]?", re.IGNORECASE)
_BETWEEN = re.compile(r"[\s,;，、；\[\]]*(?:(?:and|和)[\s,;]*)?")


def read_spans(text: str) -> list[Span] | None:
    """Spans in seconds: [12.5, 20], 12.5 - 20 s, 00:12 to 00:20, several of them; None if the text holds other things."""
    spans, at = [], 0
    for found in _SPAN.finditer(text):
        if not _BETWEEN.fullmatch(text[at : found.start()]):
            return None
        parts = found.groups()
        spans.append((_seconds(parts[:3]), _seconds(parts[3:])))
        at = found.end()
    return spans if spans and _BETWEEN.fullmatch(text[at:].rstrip(". ")) else None


def _seconds(parts: tuple[str | None, ...]) -> float:
    seconds = 0.0
    for part in parts:
        seconds = seconds * 60 + float(part) if part is not None else seconds
    return seconds


class VideoVerifier(ShortAnswerVerifier[VideoConfig]):
    """Videos: short answers, or spans of time where the reference is {start, end}, [start, end], or a list of such."""

    def compare(self, task: Task, answer: str) -> Reward | Question:
        """IoU of spans, or a short answer."""
        if not isinstance(task.answer, list | tuple | Mapping):
            return super().compare(task, answer)
        reference = _reference(task.answer)
        if reference is None:
            raise BadReference("the reference is not a span [start, end] in seconds with start before end")
        if len(answer) > 40 * self.settings.max_spans:
            return wrong("limit", f"{len(answer)} characters for spans")
        spans = read_spans(answer)
        if spans is None or not all(_is_span(span) for span in spans):
            return wrong(detail="not spans of time with start before end")
        if len(spans) > self.settings.max_spans:
            return wrong("limit", f"{len(spans)} spans, more than {self.settings.max_spans}")
        value = span_iou(spans, reference)
        correct = value >= self.settings.span_correct_from
        return Reward(value, correct, "right" if correct else "partial" if value > 0 else "wrong", f"IoU {value:.3f}")


def _is_span(span: Span) -> bool:
    return math.isfinite(span[1]) and 0 <= span[0] < span[1]


def _reference(answer: Any) -> list[Span] | None:
    if isinstance(answer, Mapping):
        answer = [answer.get("start"), answer.get("end")]
    items = [answer] if numbers(answer, 2) is not None else [_pair(item) for item in answer]
    spans = [numbers(item, 2) for item in items]
    if not spans or any(span is None or not _is_span(span) for span in spans):  # type: ignore[arg-type]
        return None
    return spans  # type: ignore[return-value]


def _pair(item: Any) -> Any:
    return [item.get("start"), item.get("end")] if isinstance(item, Mapping) else item
