"""The forms in which the community writes samples, brought into one.

Four forms are read, told apart by their keys: ours (`messages` with items of type text, image, video), LLaVA's
(`conversations` of from and value, `<image>` and `<video>` in the text, media beside it), OpenAI's (`image_url` items, also as
data: URIs), and a picture with its caption. Media that a text only points at are taken in order.

Source: LLaVA docs/Finetune_Custom_Data.md (conversations, <image>); OpenAI API reference, chat messages (image_url); the
columns `images` and `messages` of TRL's vision data sets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data_tools.corpus.faults import Fault

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
         "chatgpt": "assistant", "bot": "assistant", "system": "system"}  # fmt: skip
"""What other forms call the roles."""
PLACEHOLDER = re.compile(r"<(image|video)>[ ]?\n?|\n?<(image|video)>")
"""A place of a medium in a text, with the line break that sets it apart."""
MEDIA_KEYS = {"image": "image", "images": "image", "video": "video", "videos": "video"}
CAPTION_KEYS = ("caption", "text", "txt")
CONVERSATION_KEYS = ("messages", "conversations")
KEY_KEYS = ("id", "key", "__key__")


@dataclass(frozen=True)
class Draft:
    """A sample in our form whose media are not found yet.

    Attributes:
        key: its own, or None.
        turns: messages in our form; the value of a medium is an entry of `media`.
        media: kind and what the sample says about each medium, in the order of the text: a name, a data: URI, {bytes, path},
            or None for the next one that comes with the sample.
        extra: every other field of the sample.
    """

    key: str | None
    turns: list[dict[str, Any]]
    media: list[tuple[str, Any]]
    extra: dict[str, Any]


def draft_sample(tree: Mapping[str, Any], attached: int = 0) -> Draft:
    """Bring a sample into our form.

    Args:
        tree: the sample as read from JSON or a row of a table.
        attached: media that come with the sample outside of `tree` (members of a tar).

    Raises:
        Fault: no conversation in any of the forms, or a text that is none.
    """
    tree = {name: value for name, value in tree.items() if value is not None}
    key = next((_clean_key(tree[name]) for name in KEY_KEYS if name in tree), None)
    beside = [(kind, value) for name, kind in MEDIA_KEYS.items() for value in _as_list(tree.get(name))]
    used = {*MEDIA_KEYS, *KEY_KEYS, *CONVERSATION_KEYS}
    try:
        conversation = next((tree[name] for name in CONVERSATION_KEYS if name in tree), None)
        if conversation is None:
            caption = next((name for name in CAPTION_KEYS if name in tree), None)
            if caption is None or not (beside or attached):
                raise Fault("sample_invalid", "neither messages, conversations nor a picture with a caption")
            used.add(caption)
            conversation = _caption_turns(tree[caption], beside or [("image", None)] * attached)
        has_placeholders = bool(beside or attached) and not _has_media_items(conversation)
        turns, media = _Turns(beside, has_placeholders).convert(conversation)
    except Fault as fault:
        raise Fault(fault.reason, fault.detail, key or "") from None
    return Draft(key, turns, media, {name: value for name, value in tree.items() if name not in used})


class _Turns:
    """Converts one conversation; media beside it are handed out in order."""

    def __init__(self, beside: list[tuple[str, Any]], has_placeholders: bool) -> None:
        self._waiting = {kind: [value for other, value in beside if other == kind] for kind in ("image", "video")}
        self._has_beside = bool(beside)
        self._has_placeholders = has_placeholders
        self._media: list[tuple[str, Any]] = []

    def convert(self, conversation: Any) -> tuple[list[dict[str, Any]], list[tuple[str, Any]]]:
        """Its turns in our form, and its media as (kind, value) in the order of their places.

        Raises:
            Fault: it is no list of messages, or media and places do not match.
        """
        if not isinstance(conversation, list):
            raise Fault("sample_invalid", "the conversation is not a list")
        turns = [self._turn(turn) for turn in conversation]
        left = sum(map(len, self._waiting.values()))
        if left:
            raise Fault("media_without_placeholder", f"{left} of the pictures and videos have no place in the text")
        return turns, self._media

    def _turn(self, turn: Any) -> dict[str, Any]:
        if not isinstance(turn, Mapping):
            raise Fault("sample_invalid", "a message is not an object")
        role = turn.get("role") or turn.get("from")
        content = turn["content"] if turn.get("content") is not None else turn.get("value")
        if isinstance(content, str):
            items = list(self._split(content))
        elif isinstance(content, list):
            items = [item for piece in content for item in self._item(piece)]
        else:
            raise Fault("text_not_a_string", f"{content!r:.80}")
        return {"role": ROLES.get(role, role) if isinstance(role, str) else role, "content": items}

    def _item(self, item: Any) -> Iterator[dict[str, str]]:
        if isinstance(item, str):
            yield from self._split(item)
            return
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "text":
            yield from self._split(item.get("text"))
        elif kind in ("image", "video"):
            value = next((item[name] for name in (kind, "url", "path", "bytes") if item.get(name) is not None), None)
            yield self._place(kind, value)
        elif kind in ("image_url", "video_url"):
            value = item.get(kind)
            yield self._place(kind.removesuffix("_url"), value.get("url") if isinstance(value, Mapping) else value)
        else:
            raise Fault("sample_invalid", f"an item of type {kind!r:.80} is neither text, image nor video")

    def _split(self, text: Any) -> Iterator[dict[str, str]]:
        """Texts and the media whose places stand in them."""
        check_text(text)
        end = 0
        for found in PLACEHOLDER.finditer(text) if self._has_placeholders else ():
            if text[end : found.start()]:
                yield {"type": "text", "text": text[end : found.start()]}
            yield self._place(found.group(1) or found.group(2), None)
            end = found.end()
        if text[end:] or not end:
            yield {"type": "text", "text": text[end:]}

    def _place(self, kind: str, value: Any) -> dict[str, str]:
        if value is None and self._has_beside:
            if not self._waiting[kind]:
                raise Fault("placeholder_without_media", f"the text has a place for one more {kind} than there are")
            value = self._waiting[kind].pop(0)
        self._media.append((kind, value))
        return {"type": kind, kind: str(len(self._media) - 1)}


def check_text(text: Any) -> None:
    """Refuse what is no text.

    Raises:
        Fault: a number such as NaN, or a string that has no UTF-8 bytes.
    """
    if not isinstance(text, str):
        raise Fault("text_not_a_string", f"{text!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Fault("text_not_unicode", ascii(text[:80])) from None


def _has_media_items(conversation: Any) -> bool:
    """Whether media stand as items of their own; then `<image>` in a text is text."""
    contents = (
        [turn.get("content") for turn in conversation if isinstance(turn, Mapping)] if isinstance(conversation, list) else []
    )
    items = [item for content in contents if isinstance(content, list) for item in content]
    return any(isinstance(item, Mapping) and item.get("type") not in ("text", None) for item in items)


def _caption_turns(caption: Any, media: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    check_text(caption)
    return [
        {"role": "user", "content": [{"type": kind} for kind, _ in media]},
        {"role": "assistant", "content": [{"type": "text", "text": caption}]},
    ]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _clean_key(value: Any) -> str | None:
    """A key as text; None for what cannot name a sample."""
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        return None
    text = str(value)
    return text.encode("utf-8", "backslashreplace").decode()[:500]
