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


def format_count(value: float, unit: str = "") -> str:
    """A count with three digits: 7, 12.3, 1.23k, 45.6M; with a unit that takes the prefix: 2.00 TFLOP/s."""
    size = abs(value)
    for size_of, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= size_of * 0.9995:
            return _three_digits(value / size_of) + (f" {suffix}{unit}" if unit else suffix)
    return (str(int(value)) if float(value).is_integer() else _three_digits(value)) + (f" {unit}" if unit else "")


def format_duration(seconds: float) -> str:
    """A time that is left: 0:42, 12:05, 3:04:05, 2 d 03:04."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(round(seconds), 0)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"


def format_rate(rate: float) -> str:
    """A learning rate: 1e-4, 2.35e-05 as 2.35e-5."""
    mantissa, _, exponent = f"{rate:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if rate else "0"


def _three_digits(value: float) -> str:
    size = abs(value)
    return f"{value:.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"
