"""Counts, durations and rates as a person reads them."""

from __future__ import annotations

import math


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
