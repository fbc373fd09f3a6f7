"""The line that a person watches while a run goes on: in place on a terminal, now and then in a log file."""

from __future__ import annotations

import math
import sys
import time
from typing import TextIO

PLAIN_INTERVAL_S = 10.0
"""Seconds between lines where the output is a file or a pipe."""
_CLEAR = "\r\x1b[2K"


class ProgressLine:
    """One line that renews itself on a terminal; elsewhere a line every few seconds.

    Args:
        stream: where to write; a terminal is recognised by ``isatty``.
        interval_s: seconds between lines where it is not a terminal.
    """

    def __init__(self, stream: TextIO | None = None, interval_s: float = PLAIN_INTERVAL_S) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._interval_s = interval_s
        self._in_place = self._stream.isatty()
        self._open = False
        self._last = -math.inf

    def show(self, text: str, *, important: bool = False) -> None:
        """Renew the line; where there is no terminal, print it if enough time has passed or if it is `important`."""
        if self._in_place:
            self._stream.write(_CLEAR + text)
            self._open = True
        elif important or time.monotonic() - self._last >= self._interval_s:
            self._stream.write(text + "\n")
            self._last = time.monotonic()
        self._stream.flush()

    def note(self, text: str) -> None:
        """Print a line that stays, above the one that renews itself."""
        self._stream.write((_CLEAR if self._open else "") + text + "\n")
        self._open = False
        self._stream.flush()

    def close(self) -> None:
        """Leave the last line standing."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
            self._open = False
