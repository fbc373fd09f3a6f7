"""Lines of JSON that hold what a model wrote, which need not be a text that UTF-8 can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def as_line(tree: Mapping[str, Any]) -> str:
    """One line of JSON without its end, with characters as they are where UTF-8 can hold them."""
    text = json.dumps(tree, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return json.dumps(tree)
    return text
