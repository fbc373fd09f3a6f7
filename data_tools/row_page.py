"""A page of packed rows: one HTML file that needs no server, no network and no other file.

Tokens are stored as three bytes each and written out by the browser when a document is opened, visual tokens as one mark a
frame, so that fifty rows of 32,768 tokens stay a page that a browser opens.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.lint import LINTS, Finding, visual_runs
from data_tools.row_chart import draw_row
from data_tools.thumbnails import draw_thumbnails
from megatron_glmv.data.chat import Chat
from megatron_glmv.data.index import PackedIndex
from megatron_glmv.data.shard_reader import StoredRow
from megatron_glmv.sequence.packed import Document

FOLDER = Path(__file__).parent
MAX_THUMBNAILS = 48
"""Pictures and frames shown of a row."""
OPEN_TOKENS = 4000
"""Documents are open from the start until so many tokens are shown."""
MAX_LISTED = 200
"""Findings listed."""
LEGEND = "".join((
    '<p class="legend">',
    *(f'<span><i style="background:{colour}"></i>{name}</span>' for colour, name in (
        ("rgba(var(--trained),.32)", "trained (loss weight 1)"), ("rgba(var(--trained),.2)", "smaller weight"),
        ("var(--line)", "masked"), ("var(--visual)", "visual tokens, rows × columns after merging"),
        ("var(--t)", "time"), ("var(--h)", "row"), ("var(--w)", "column position"),
    )),
    "<span>hover a token for its id, weight and positions</span></p>",
))  # fmt: skip


@dataclass
class RowPage:
    """Collects rows and writes the page.

    Attributes:
        title: of the page.
        index: of the data set.
        chat: its processor, for the texts of tokens.
        max_patches: the budget, or the most that a row of the data set has.
        has_budget: which of both.
    """

    title: str
    index: PackedIndex
    chat: Chat | None
    max_patches: int
    has_budget: bool
    _sections: list[str] = field(default_factory=list)
    _documents: list[dict[str, Any]] = field(default_factory=list)
    _ids: set[int] = field(default_factory=set)
    _shown: int = 0

    def add(self, number: int, row: StoredRow, findings: Sequence[Finding]) -> None:
        """Append one row, media included."""
        self._sections.append(self._section(number, row, findings))

    def html(self, facts: Sequence[tuple[str, str]], findings: Sequence[Finding], linted: str) -> str:
        """The page.

        Args:
            facts: name and value of what stands under the title.
            findings: of all rows that were checked.
            linted: which rows these are, in words.
        """
        data = {"image": self.index.tokens.image, "texts": self._texts(), "documents": self._documents}
        listed = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in facts)
        css, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
        blob = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{escape(self.title)}</title><style>{css}</style></head><body><main>"
            f'<h1>{escape(self.title)}</h1><div class="soft">packed rows, as training reads them</div>'
            f'<div class="facts">{listed}</div>{_list_findings(findings, linted)}{LEGEND}{"".join(self._sections)}'
            f"<footer>glmv-data inspect</footer></main><div id=tip></div>"
            f'<script type="application/json" id="data">{blob}</script><script>{script}</script></body></html>\n'
        )

    def _section(self, number: int, row: StoredRow, findings: Sequence[Finding]) -> str:
        tokens = sum(len(document.tokens) for document in row.documents)
        patches = sum(rows * columns for document in row.documents for rows, columns in document.frames)
        trained = sum(document.num_trained for document in row.documents)
        budgets = _budget("tokens", tokens, self.index.length) + _budget(
            "patches" if self.has_budget else "patches, most", patches, self.max_patches
        )
        chart = draw_row(row, self.index.length, self.index.align, self.index.tokens.image, self.index.merge_size)
        documents, left = [], MAX_THUMBNAILS
        for place in range(len(row.documents)):
            own = [finding for finding in findings if finding.document == place]
            html, used = self._document(number, row, place, own, left)
            documents.append(html)
            left -= used
        badges = "".join(_badge(finding) for finding in findings if finding.document < 0)
        return (
            f'<section class="row" id="row-{number}"><header><h2>Row {number} <small>{escape(row.key)} · '
            f"{len(row.documents)} documents · {trained:,} tokens trained</small>{badges}</h2>"
            f'<div class="budgets">{budgets}</div></header>{chart}{"".join(documents)}</section>'
        )

    def _document(self, number: int, row: StoredRow, place: int, findings: Sequence[Finding], left: int) -> tuple[str, int]:
        document = row.documents[place]
        thumbnails: list[tuple[str, str]] = []
        for media, data in zip(row.media[place], row.data[place] if row.data else (), strict=False):
            if len(thumbnails) < left:
                thumbnails += draw_thumbnails(media, data)
        kinds = [media.kind for media in row.media[place]]
        shown = ", ".join(f"{kinds.count(kind)} {kind}{'s' * (kinds.count(kind) > 1)}" for kind in dict.fromkeys(kinds))
        trained = document.num_trained / max(1, len(document.tokens))
        self._documents.append(self._encode(document))
        is_open = self._shown < OPEN_TOKENS or bool(findings)
        self._shown += len(document.tokens) - sum(end - start for start, end in visual_runs(document, self.index.tokens.image))
        figures = "".join(map(_figure, thumbnails))
        facts = " · ".join(filter(None, (f"{len(document.tokens):,} tokens", shown, f"{trained:.0%} trained")))
        return (
            f'<details class="doc" id="row-{number}-{place}"{" open" * is_open}><summary><b>{escape(document.key)}</b> '
            f"<small>{facts}</small>{''.join(map(_badge, findings))}</summary>"
            f'<div class="media">{figures}</div><div class="tokens" data-doc="{len(self._documents) - 1}"></div></details>'
        ), len(thumbnails)

    def _encode(self, document: Document) -> dict[str, Any]:
        """Ids as three bytes each, a run of visual tokens as one; frames after merging; weights as runs."""
        runs = visual_runs(document, self.index.tokens.image)
        merge = self.index.merge_size
        frames = [[1, end - start] for start, end in runs]
        if len(runs) == len(document.frames):
            grids = [[rows // merge, columns // merge] for rows, columns in document.frames]
            frames = [grid if grid[0] * grid[1] == run[1] else run for grid, run in zip(grids, frames, strict=True)]
        kept = np.ones(len(document.tokens), dtype=np.bool_)
        for start, end in runs:
            kept[start + 1 : end] = False
        ids = document.tokens[kept].astype("<u4")
        self._ids.update(np.unique(ids).tolist())
        packed = base64.b64encode(ids.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()).decode()
        weights = [[len(list(group)), round(float(weight), 4)] for weight, group in groupby(document.loss_weights.tolist())]
        return {"ids": packed, "frames": frames, "weights": weights}

    def _texts(self) -> dict[int, str]:
        if self.chat is None:
            return {token: f"⟨{token}⟩" for token in self._ids}
        decode, names = self.chat.tokenizer.decode, self.chat.tokenizer.convert_ids_to_tokens
        texts = {token: decode([token], skip_special_tokens=False) for token in self._ids}
        # A part of a character has no text of its own; its name says which bytes it is.
        return {token: text if text and "\ufffd" not in text else str(names(token)) for token, text in texts.items()}


def _figure(thumbnail: tuple[str, str]) -> str:
    caption, uri = thumbnail
    picture = f'<img src="{uri}" alt="" loading="lazy">' if uri else ""
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _budget(name: str, used: int, most: int) -> str:
    share = used / most if most else 0.0
    full = ' class="full"' if share >= 0.97 else ""
    return (f'<div class="budget"><p><span>{name}</span>{used:,} / {most:,} · {share:.1%}</p>'
            f'<div class="bar"><i{full} style="width:{min(1.0, share):.1%}"></i></div></div>')  # fmt: skip


def _badge(finding: Finding) -> str:
    return f'<span class="badge" title="{escape(finding.detail)}">{finding.code}</span>'


def _list_findings(findings: Sequence[Finding], linted: str) -> str:
    if not findings:
        verdict = f'<span class="good">nothing found</span> <span class="soft">in {escape(linted)}</span>'
        return f'<div class="panel"><h2>Lint</h2>{verdict}</div>'
    rows = "".join(map(_list_finding, findings[:MAX_LISTED]))
    more = f'<p class="soft">and {len(findings) - MAX_LISTED:,} more</p>' if len(findings) > MAX_LISTED else ""
    head = "".join(f"<th>{name}</th>" for name in ("where", "what", "sample", ""))
    return (
        f'<div class="panel"><h2>Lint <small>{len(findings):,} findings in {escape(linted)}</small></h2>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{more}</div>"
    )


def _list_finding(finding: Finding) -> str:
    target = f"row-{finding.row}" + (f"-{finding.document}" if finding.document >= 0 else "")
    detail = f": {escape(finding.detail)}" if finding.detail else ""
    return (
        f'<tr><td><a href="#{target}">row {finding.row}</a></td><td><code>{finding.code}</code></td>'
        f"<td>{escape(finding.key)}</td><td>{escape(LINTS[finding.code])}{detail}</td></tr>"
    )
