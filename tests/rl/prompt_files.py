"""Prompts of every kind that a run meets: text, pictures, a video, with answers that random text half earns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.data.clips import clip
from tests.data.pictures import draw, encode

REFERENCE = "the digit is seven and the answer is briefly read"


def write_prompts(folder: Path, number: int = 12) -> Path:
    """A JSONL file of `number` good prompts, a picture that is missing, and a line without an answer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "clip.mp4").write_bytes(clip(31, 60, 100))
    for size in range(3):
        (folder / f"picture{size}.png").write_bytes(encode(draw(60 + 28 * size, 100, size)))
    lines = [_prompt(f"prompt-{place}", _content(place)) for place in range(number)]
    lines.append(_prompt("missing", [{"type": "image", "image": "nowhere.png"}, {"type": "text", "text": "Read it."}]))
    lines.append({key: value for key, value in _prompt("unanswered", "Read it.").items() if key != "answer"})
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _prompt(key: str, content: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "left out"}]
    return {"id": key, "messages": messages, "domain": "ocr", "subcategory": key[-1], "answer": REFERENCE}


def _content(place: int) -> Any:
    question = {"type": "text", "text": f"Read the digits, number {place}."}
    if place % 3 == 0:
        return question["text"]
    if place % 3 == 1:
        return [{"type": "image", "image": f"picture{size}.png"} for size in range(1 + place % 2)] + [question]
    return [{"type": "video", "video": "clip.mp4"}, question]
