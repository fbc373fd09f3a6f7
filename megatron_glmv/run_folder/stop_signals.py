"""SIGTERM and SIGUSR1 as requests to stop, noted from a rank's first second on and answered where all ranks can agree.

By default they end a process at once, which the other ranks would take for a fault; and loading torch alone takes seconds.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_received: list[str] = []


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Take signals as requests inside the block; for the main thread."""
    before = {number: signal.signal(number, _take) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def received() -> str:
    """The newest signal inside the block; empty: none."""
    return _received[-1] if _received else ""


def _take(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)
