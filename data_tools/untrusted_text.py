"""Text that a model wrote, as HTML that can only be read: nothing in it becomes markup, and nothing in it is invisible.

Characters that reorder, hide or end a line (bidirectional controls, zero-width characters, control codes, halves of surrogate
pairs) are written out as their numbers: a reviewer sees what the verifier saw.

Source: Unicode 15, general categories Cc, Cf, Cs, Co, Zl, Zp; Unicode Technical Report 36, section 2 (visual spoofing).
"""

from __future__ import annotations

import re
import unicodedata
from html import escape

MAX_TEXT = 16_000
"""Characters shown of one text; the middle of a longer one is left out."""
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
_SPECIAL = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?(?:think|answer)>")
_OPEN, _CLOSE = "<|begin_of_box|>", "<|end_of_box|>"
_SUSPECT = re.compile(r"[^\n\t\x20-\x7e\u00a1-\u00ac\u00ae-\u05ff\u3000-\ud7ff]")
"""Characters whose category has to be looked up."""


def show_text(text: str, limit: int = MAX_TEXT) -> str:
    """Escaped text, hidden characters as marks; cut in the middle where it is longer than `limit`."""
    if len(text) <= limit:
        return _show(text)
    half = limit // 2
    left_out = f'<i class="cut">… {len(text) - 2 * half:,} characters left out …</i>'
    return f"{_show(text[:half])}{left_out}{_show(text[-half:])}"


def show_answer(text: str, limit: int = MAX_TEXT) -> str:
    """An answer with special tokens marked, the box highlighted and the thinking folded."""
    thinking, rest, closed = split_thinking(text)
    if thinking is None:
        return show_text(rest, limit)
    words = f"thinking, {len(thinking):,} characters" + ("" if closed else ", never closed")
    folded = f'<details class="think"><summary>{words}</summary>{show_text(thinking, limit)}</details>'
    return folded + (f'<div class="said">{show_text(rest.lstrip(chr(10)), limit)}</div>' if rest else "")


def in_attribute(text: str, limit: int = 400) -> str:
    """Escaped text for an attribute."""
    return _SUSPECT.sub(lambda found: re.sub(r"<[^>]*>", "", _mark(found)), escape(text[:limit]))


def split_thinking(text: str) -> tuple[str | None, str, bool]:
    """(thinking without its tags, None without any; the rest; whether it was closed).

    A template may open the thinking in the prompt, so a closing tag alone ends one too.
    """
    before, closing, after = text.partition("</think>")
    opened = before.lstrip().startswith("<think>")
    if not closing and not opened:
        return None, text, False
    return before.lstrip().removeprefix("<think>").strip("\n") if opened else before.strip("\n"), after, bool(closing)


def _show(text: str) -> str:
    parts, last, boxed = [], 0, False
    for found in _SPECIAL.finditer(text):
        parts.append(_plain(text[last : found.start()], boxed))
        parts.append(f'<i class="tok">{escape(found[0])}</i>')
        boxed = found[0] == _OPEN or (boxed and found[0] != _CLOSE)
        last = found.end()
    parts.append(_plain(text[last:], boxed))
    return "".join(parts)


def _plain(text: str, boxed: bool) -> str:
    shown = _SUSPECT.sub(_mark, escape(text))
    return f'<b class="box">{shown}</b>' if boxed and text else shown


def _mark(found: re.Match[str]) -> str:
    character = found[0]
    if unicodedata.category(character) not in HIDDEN:
        return character
    return f'<i class="ctl">U+{ord(character):04X}</i>'
