"""What is wrong with packed rows, found without training on them: one finding a document and fault.

A data set can be well-formed and still teach nothing, or the wrong thing: a prompt that is trained, a turn whose end is not, a
picture that the text does not show. A run on it looks healthy for days.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from megatron_glmv.data.chat import ROLE_TOKENS, STOPS, VIDEO, Chat
from megatron_glmv.data.format import TAGS, AnswerFormat, check_answer
from megatron_glmv.data.index import PackedIndex
from megatron_glmv.data.shard_reader import StoredRow
from megatron_glmv.sequence.packed import Document

LINTS = {
    "row_unreadable": "the row does not read, or contradicts itself",
    "row_too_long": "documents take more than the row has",
    "media_count": "visual tokens stand in more or fewer runs than the document has frames",
    "visual_tokens": "a run of visual tokens has another length than its frame",
    "frame_odd": "a frame's sides are not multiples of the merge size",
    "placeholder_left": "a placeholder of a medium stands in the text, and nothing is shown for it",
    "visual_trained": "visual tokens are trained",
    "weight_invalid": "a loss weight is negative or no number",
    "nothing_trained": "every token is masked",
    "everything_trained": "no token is masked, not even the prompt",
    "no_stop_trained": "no token that ends a turn is trained: the model would not learn to stop",
    "answer_format": "a trained answer whose think, answer or box tags are broken",
}
"""Code -> what it means."""
LITERAL_PLACEHOLDERS = ("<image>", "<video>", VIDEO)
Answers = Literal["tagged", "all", "none"]


@dataclass(frozen=True)
class Finding:
    """Something wrong with a document.

    Attributes:
        row: number of the row.
        document: its place in the row, -1 for the row itself.
        key: of the sample.
        code: of LINTS.
        detail: what exactly.
    """

    row: int
    document: int
    key: str
    code: str
    detail: str = ""


class Linter:
    """Checks rows of one data set."""

    def __init__(self, index: PackedIndex, chat: Chat | None, answers: Answers = "tagged") -> None:
        """Prepare.

        Args:
            index: of the data set.
            chat: its processor; without one, texts and ends of turns are not checked.
            answers: check the form of answers that hold a tag of it, of all trained answers, or of none.
        """
        self._index, self._chat, self._answers = index, chat, answers
        if chat is not None:
            ids = {marker: chat.tokenizer.convert_tokens_to_ids(marker) for marker in ROLE_TOKENS}
            self._roles, self._assistant = np.array(list(ids.values())), ids["<|assistant|>"]
            self._stops = np.array([*(ids[marker] for marker in STOPS), chat.pad_token])

    def check(self, number: int, row: StoredRow) -> Iterator[Finding]:
        """The findings of a row, document by document."""
        align = self._index.align
        taken = sum(-(-len(document.tokens) // align) * align for document in row.documents)
        if taken > self._index.length:
            yield Finding(number, -1, row.key, "row_too_long", f"{taken} tokens in a row of {self._index.length}")
        for place, document in enumerate(row.documents):
            faults = [*self._check_media(document), *self._check_weights(document)]
            if self._chat is not None:
                faults += self._check_texts(document, self._chat)
            for code, detail in faults:
                yield Finding(number, place, document.key, code, detail)

    def _check_media(self, document: Document) -> Iterator[tuple[str, str]]:
        merge = self._index.merge_size
        runs = visual_runs(document, self._index.tokens.image)
        if len(runs) != len(document.frames):
            yield "media_count", f"{len(runs)} runs of visual tokens, {len(document.frames)} frames"
            return
        for (start, end), (rows, columns) in zip(runs, document.frames, strict=True):
            if rows % merge or columns % merge:
                yield "frame_odd", f"{rows} x {columns} patches"
            elif end - start != rows * columns // merge**2:
                yield "visual_tokens", f"{end - start} tokens at {start} for a frame of {rows} x {columns} patches"
        if any(document.loss_weights[start:end].any() for start, end in runs):
            yield "visual_trained", ""

    def _check_weights(self, document: Document) -> Iterator[tuple[str, str]]:
        weights = document.loss_weights
        if not np.isfinite(weights).all() or (weights < 0).any():
            yield "weight_invalid", f"{weights[~np.isfinite(weights) | (weights < 0)][0]}"
        elif not weights[1:].any():
            yield "nothing_trained", ""
        elif weights.all():
            yield "everything_trained", ""

    def _check_texts(self, document: Document, chat: Chat) -> Iterator[tuple[str, str]]:
        tokens, weights = document.tokens, document.loss_weights
        is_shown = tokens != self._index.tokens.image
        text = chat.tokenizer.decode(tokens[is_shown].tolist(), skip_special_tokens=False)
        for marker in LITERAL_PLACEHOLDERS:
            if marker in text:
                yield "placeholder_left", f"{marker} {text.count(marker)} times"
        trained = weights > 0
        if trained[1:].any() and not (trained & np.isin(tokens, self._stops)).any():
            yield "no_stop_trained", ""
        if self._answers == "none":
            return
        edges = [*np.flatnonzero(np.isin(tokens, self._roles)).tolist(), len(tokens) - 1]
        for start, end in pairwise(edges):
            if tokens[start] != self._assistant or not trained[start + 1 : end].any():
                continue
            answer = chat.tokenizer.decode(tokens[start + 1 : end].tolist(), skip_special_tokens=False).strip()
            faults = self._check_form(answer)
            if faults:
                yield "answer_format", f"{', '.join(faults)} in {answer[:60]!r}"

    def _check_form(self, answer: str) -> list[str]:
        if self._answers == "all":
            return list(check_answer(answer, AnswerFormat()))
        if not TAGS.search(answer):
            return []
        return list(check_answer(answer, AnswerFormat("any", answer_tags="answer>" in answer, box="optional")))


def visual_runs(document: Document, image_token: int) -> list[tuple[int, int]]:
    """Start and end of each run of visual tokens; runs of video frames are apart because seconds stand between them."""
    is_visual = np.concatenate(([False], document.tokens == image_token, [False])).astype(np.int8)
    edges = np.flatnonzero(np.diff(is_visual)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
