r"""One step of an agent on a screen: the action must match, and each of its parts earns a share.

An action is one JSON object: {"action": NAME, ...parts}, coordinates per-mille of the screen.

    click, double_click, right_click, long_press    "point": [x, y] or "box": [left, top, right, bottom]
    drag                                            "point" or "box" where it starts, "to": [x, y] or a box
    type                                            "text", optionally "point" or "box"
    scroll                                          "direction": up, down, left or right; optionally "point" or "box"
    key                                             "key": enter, ctrl+c, ...
    open                                            "app"
    wait, back, home, enter, done, fail             nothing
    answer                                          "text"

The reward is the product over the parts of the reference: a place by IoU or distance, a text by edit distance, the rest by
equality; a wrong action is 0. Names of AndroidWorld and OSWorld are understood too. A reference that is a bare point or box is
grounding, one that is a text is a question: equal, or the judge.

Source: arXiv 2507.01006, section 5.2; tolerance of zai-org/GLM-V 8fc9756, whose verifiers of agents gave 0 to every answer
because of a misspelled keyword.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from megatron_glmv.config.rewards import GuiConfig
from megatron_glmv.rl.rewards.geometry import Box, iou, is_box, numbers, read_boxes, read_point
from megatron_glmv.rl.rewards.notation import folded
from megatron_glmv.rl.rewards.verifiers.base import RIGHT, WRONG, BadReference, Question, Verifier, wrong
from megatron_glmv.rl.rewards.verifiers.ocr import likeness
from megatron_glmv.rl.types import Reward, Task

_PLACE = ("place",)
ACTIONS: dict[str, tuple[str, ...]] = {
    "click": _PLACE, "double_click": _PLACE, "right_click": _PLACE, "long_press": _PLACE, "drag": ("place", "to"),
    "type": ("text",), "scroll": ("direction",), "key": ("key",), "open": ("app",), "answer": ("text",),
    "wait": (), "back": (), "home": (), "enter": (), "done": (), "fail": (),
}  # fmt: skip
"""Action -> parts that it needs."""
ALIASES = {
    "left_click": "click", "tap": "click", "left_double": "double_click", "double_tap": "double_click",
    "right_single": "right_click", "input_text": "type", "input": "type", "write": "type", "swipe": "scroll",
    "hotkey": "key", "press": "key", "open_app": "open", "launch": "open", "navigate_back": "back", "press_back": "back",
    "navigate_home": "home", "press_home": "home",
    "keyboard_enter": "enter", "press_enter": "enter", "finished": "done", "complete": "done", "terminate": "done",
    "infeasible": "fail", "left_drag": "drag", "select": "drag",
}  # fmt: skip
"""Other names -> ours."""
_KEYS = {"action_type": "action", "start_box": "box", "bbox": "box", "coordinate": "point", "end_box": "to", "content": "text",
         "value": "text", "app_name": "app", "keys": "key"}  # fmt: skip
_TEXTS = ("text", "direction", "key", "app")
_MAX_PARTS = 12


class GuiVerifier(Verifier[GuiConfig]):
    """Actions, places and questions on screens."""

    def compare(self, task: Task, answer: str) -> Reward | Question:
        """An action, a place or a text, by what the reference is."""
        reference = _parsed(task.answer)
        if isinstance(reference, str):
            return self.ask(task, answer, WRONG)
        if isinstance(reference, tuple):
            place = read_place(answer)
            return wrong(detail="not one point or box") if place is None else self.continuous(self._place(place, reference))
        if isinstance(_json(answer), list):
            return Reward(self.settings.hack_reward, False, "hack: several", "a list where one action is asked")
        given = action(_json(answer))
        if given is None:
            return wrong(detail="not one action as a JSON object")
        if given["action"] != reference["action"]:
            return wrong(detail=f"{given['action']} instead of {reference['action']}")
        shares = {part: self._share(part, given.get(part), wanted) for part, wanted in reference.items() if part != "action"}
        if not shares:
            return RIGHT
        return self.continuous(math.prod(shares.values()), ", ".join(f"{part} {share:.2f}" for part, share in shares.items()))

    def _share(self, part: str, given: Any, wanted: Any) -> float:
        if given is None:
            return 0.0
        if part in ("place", "to"):
            return self._place(given, wanted)
        if part == "text":
            return likeness(given, wanted)
        return float(_key(given) == _key(wanted))

    def _place(self, given: tuple[float, ...], wanted: tuple[float, ...]) -> float:
        """1 at the place, falling to 0 over the tolerance; IoU where both are boxes."""
        scale, tolerance = self.settings.scale, self.settings.tolerance
        if len(given) == len(wanted) == 4 and self.settings.box_reward == "iou":
            box: Box = given
            return iou(box, wanted) if is_box(box, scale) else 0.0
        x, y = _center(given)
        if not (0 <= x <= scale and 0 <= y <= scale):
            return 0.0
        left, top, right, bottom = wanted if len(wanted) == 4 else (*wanted, *wanted)
        distance = math.hypot(max(left - x, 0, x - right), max(top - y, 0, y - bottom))
        return max(0.0, 1 - distance / tolerance)


def _center(place: tuple[float, ...]) -> tuple[float, float]:
    return ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2) if len(place) == 4 else (place[0], place[1])


def _key(text: str) -> str:
    return "+".join(sorted(folded(text).replace(" ", "+").replace("-", "+").split("+")))


def _parsed(reference: Any) -> dict[str, Any] | tuple[float, ...] | str:
    """The reference as an action, a place or a text."""
    if isinstance(reference, str):
        if (place := read_place(reference)) is not None:
            return place
        tree = _json(reference)
        if not isinstance(tree, Mapping):
            return reference
        reference = tree
    if (place := as_place(reference)) is not None:
        return place
    found = action(reference)
    if found is None:
        raise BadReference(f"the reference is no action ({', '.join(ACTIONS)}), point or box")
    return found


def action(tree: Any) -> dict[str, Any] | None:
    """An action in our names, with those of place, to, text, direction, key and app that are there; None if it is none."""
    if not isinstance(tree, Mapping) or len(tree) > _MAX_PARTS:
        return None
    parts = {_KEYS.get(key, key): value for key, value in tree.items()}
    name = parts.get("action")
    name = ALIASES.get(name.lower(), name.lower()) if isinstance(name, str) else None
    if name not in ACTIONS:
        return None
    found: dict[str, Any] = {"action": name}
    for key in ("point", "box", "to"):
        if key in parts:
            place = as_place(parts[key])
            if place is None:
                return None
            found["to" if key == "to" else "place"] = place
    for key in _TEXTS:
        value = "+".join(map(str, parts[key])) if isinstance(parts.get(key), list) else parts.get(key)
        if value is not None:
            found[key] = str(value)
    return found if all(part in found for part in ACTIONS[name]) else None


def as_place(value: Any) -> tuple[float, ...] | None:
    """A point or box from JSON: numbers, or a text that holds them."""
    if isinstance(value, str):
        return read_place(value)
    return numbers(value, 2) or numbers(value, 4)


def read_place(text: str) -> tuple[float, ...] | None:
    """The one point or box of a text that holds nothing else."""
    boxes = read_boxes(text)
    if boxes:
        return boxes[0] if len(boxes) == 1 else None
    return read_point(text)


def _json(text: str) -> Any:
    """The JSON of a text, or None; how deep it nests is limited before it is read."""
    text = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    if text.count("[") + text.count("{") > 50:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None
