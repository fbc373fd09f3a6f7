"""Numbers as a command line gives them: `3,10-19`."""

from __future__ import annotations

import re

MAX_NUMBERS = 1_000_000


def read_numbers(option: str, text: str, count: int | None = None, what: str = "rows") -> list[int]:
    """Read a list of numbers and ranges, each number once, in the order given.

    Args:
        option: name for messages.
        text: `3,10-19`.
        count: numbers are below it; None: no bound.
        what: is counted, for messages.

    Raises:
        ValueError: not of this form, or a number that is not there.
    """
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,15})(?:-(\d{1,15}))?\s*", part)
        if not found:
            raise ValueError(f"{option} {text}: not of the form 3,10-19")
        first, last = int(found[1]), int(found[2] or found[1])
        if (count is not None and max(first, last) >= count) or last - first >= MAX_NUMBERS:
            raise ValueError(f"{option} {text}: " + (f"the data set has {what} 0 to {count - 1}" if count else "too many"))
        numbers += range(first, last + 1)
    if not numbers:
        raise ValueError(f"{option} {text}: not of the form 3,10-19")
    return list(dict.fromkeys(numbers))
