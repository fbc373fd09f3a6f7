"""One sample: a conversation with pictures, checked field by field before anything is computed from it.

Content may be a plain string or a list of text and media items, as in Hugging Face's chat format; here it is always a list.
Other forms of samples (`data_tools/corpus/formats.py`) are brought into this one before they are checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant"]
ROLES = get_args(Role)


class SampleError(ValueError):
    """A sample that cannot be used; the message names it.

    Attributes:
        reason: a few words without the sample's name, for counting.
    """

    def __init__(self, key: str, reason: str, detail: str = "") -> None:
        super().__init__(f"sample {key!r}: {reason}{': ' + detail if detail else ''}")
        self.key = key
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Item:
    """A piece of a message: a text, or the path of a picture or video as the file gives it."""

    kind: Literal["text", "image", "video"]
    value: str


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: tuple[Item, ...]


@dataclass(frozen=True)
class Sample:
    """A conversation.

    Attributes:
        key: its id, or `file:line` where it has none.
        messages: at least one; the last is the assistant's, or the user's in a prompt to be answered.
        folder: media paths are relative to it.
    """

    key: str
    messages: tuple[Message, ...]
    folder: Path

    def media(self) -> Iterator[Item]:
        """Pictures and videos in the order of the text."""
        for message in self.messages:
            yield from (item for item in message.content if item.kind != "text")


def parse_sample(line: str | bytes, name: str, folder: Path) -> Sample:
    """Read one line of a JSONL file.

    Args:
        line: a JSON object with `messages` and, usually, `id`; other keys are ignored.
        name: names the line where the sample has no id.
        folder: of the file.

    Raises:
        SampleError: not JSON, no messages, an unknown role or kind of content, or a conversation that the assistant does not
            end, so that nothing at its end would be trained.
    """
    try:
        tree = json.loads(line)
    except ValueError as error:
        raise SampleError(name, "the line is not JSON", str(error)) from None
    if not isinstance(tree, dict):
        raise SampleError(name, "the line is not a JSON object")
    return check_sample(tree.get("messages"), str(tree.get("id", name)), folder)


def check_sample(turns: Any, key: str, folder: Path, *, answered: bool = True) -> Sample:
    """Check a conversation.

    Args:
        turns: list of messages, each an object with `role` and `content` (a string or a list of items).
        key: of the sample.
        folder: media paths are relative to it.
        answered: the assistant must end it; False: the last answer of the assistant, where there is one, is left out.

    Raises:
        SampleError: as parse_sample.
    """
    if not isinstance(turns, list) or not turns:
        raise SampleError(key, "no list of messages")
    messages = tuple(_parse_message(turn, key) for turn in turns)
    if not answered:
        messages = messages[:-1] if messages[-1].role == "assistant" else messages
        if not messages or messages[-1].role != "user":
            raise SampleError(key, "no question of the user to answer")
    elif messages[-1].role != "assistant":
        raise SampleError(key, "the last message is not the assistant's")
    if any(item.kind != "text" for message in messages if message.role == "assistant" for item in message.content):
        raise SampleError(key, "a picture or video in an assistant's message")
    return Sample(key, messages, folder)


def _parse_message(turn: Any, key: str) -> Message:
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        found = turn.get("role") if isinstance(turn, dict) else turn
        raise SampleError(key, f"a message's role is not one of {', '.join(ROLES)}", f"{found!r}")
    content = turn.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise SampleError(key, "a message's content is neither text nor a list of items")
    return Message(turn["role"], tuple(_parse_item(item, key) for item in content))


def _parse_item(item: Any, key: str) -> Item:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind not in ("text", "image", "video"):
        raise SampleError(key, "an item's type is not text, image or video", f"{item!r}")
    value = item.get(kind)
    if not isinstance(value, str) or (kind != "text" and not value):
        raise SampleError(key, f"an item of type {kind} has no string under {kind!r}")
    return Item(kind, value)
