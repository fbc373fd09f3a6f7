"""From a sample as read and what comes with it to a Record: the conversation in our form and checked, each medium found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.corpus.faults import Fault
from data_tools.corpus.formats import Draft, draft_sample
from data_tools.corpus.media import MediaRef, Place, Record, decode_data_uri, locate_file
from megatron_glmv.data.sample import SampleError, check_sample


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object; numbers that JSON does not have (NaN, Infinity) become None, which no text can be.

    Raises:
        Fault: not a JSON object.
    """
    try:
        tree = json.loads(text, parse_constant=lambda _: float("nan"))
    except (ValueError, RecursionError) as error:
        raise Fault("json_invalid", str(error)) from None
    if not isinstance(tree, dict):
        raise Fault("json_invalid", f"a {type(tree).__name__} where an object should be")
    return tree


def build_record(
    tree: Mapping[str, Any], source: str, holder: Place, roots: Sequence[Path], attached: Sequence[MediaRef] = (), key: str = ""
) -> Record:
    """Make a Record of a sample.

    Args:
        tree: the sample as read.
        source: where it stands, for messages; its key where it has none.
        holder: the line, member or row, for media inside it.
        roots: folders under which files may be named; none for a tar.
        attached: media that come with the sample (members of a tar), in order.
        key: used when the sample names none.

    Raises:
        Fault: whatever is wrong with it, with the sample's key.
    """
    draft = draft_sample(tree, len(attached))
    key = draft.key or key or source
    try:
        media = _find_media(draft, holder, roots, attached)
        turns = [turn | {"content": [_named(item, media) for item in turn["content"]]} for turn in draft.turns]
        sample = check_sample(turns, key, roots[0] if roots else Path())
    except SampleError as error:
        raise Fault("sample_invalid", f"{error.reason} {error.detail}".strip(), key) from None
    except Fault as fault:
        raise Fault(fault.reason, fault.detail, fault.key or key) from None
    return Record(sample, tuple(media), source, draft.extra)


def _find_media(draft: Draft, holder: Place, roots: Sequence[Path], attached: Sequence[MediaRef]) -> list[MediaRef]:
    found, waiting = [], list(attached)
    for ordinal, (kind, value) in enumerate(draft.media):
        if isinstance(value, Mapping):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        inside = replace(holder, ordinal=ordinal)
        if isinstance(value, bytes):
            ref = MediaRef("video" if kind == "video" else "image", f"{kind}-{ordinal}", inside, value)
        elif isinstance(value, str) and value.startswith("data:"):
            ref = MediaRef("video" if kind == "video" else "image", f"{kind}-{ordinal}", inside, decode_data_uri(value))
        elif attached or (value is None and not roots):
            ref = _take(kind, value, waiting)
        elif isinstance(value, str) and value:
            path = locate_file(value, roots)
            ref = MediaRef("video" if kind == "video" else "image", value, Place("file", str(path)))
        else:
            raise Fault("placeholder_without_media", f"a place for a {kind} without one")
        found.append(ref)
    if waiting:
        raise Fault("media_without_placeholder", f"{waiting[0].name} has no place in the text")
    return found


def _take(kind: str, value: Any, waiting: list[MediaRef]) -> MediaRef:
    """The member that the sample names: by its full name, its last part or its extension; without a name the next one."""
    for index, ref in enumerate(waiting):
        last = ref.name.rpartition("/")[2]
        names = (ref.name, last, last.partition(".")[2])
        if ref.kind == kind and (value is None or value in names or str(value).rpartition("/")[2] == last):
            return waiting.pop(index)
    if value is not None and sum(ref.kind == kind for ref in waiting) == 1:
        return waiting.pop(next(index for index, ref in enumerate(waiting) if ref.kind == kind))
    raise Fault("media_missing" if value is not None else "placeholder_without_media", f"{kind} {value or ''}".strip())


def _named(item: dict[str, Any], media: Sequence[MediaRef]) -> dict[str, Any]:
    kind = item["type"]
    return item if kind == "text" else {"type": kind, kind: media[int(item[kind])].name}
