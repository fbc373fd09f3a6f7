"""The value of a formula, and whether two formulas are equal: exact fractions where possible, else 50 digits.

Every intermediate value is bounded (bits of a fraction, size of a number), so that 9^9^9^9 is refused instead of computed.
Equality with symbols is tried at fixed random rational points, positive and negative ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import mpmath

from megatron_glmv.rl.rewards.expression import Node
from megatron_glmv.rl.rewards.notation import TooLarge

MAX_BITS = 4_096
"""Bits of a fraction's numerator or denominator; beyond, 50 digits are kept."""
MAX_MAGNITUDE = 20_000
"""Binary exponent of a value; beyond, it is refused."""
MAX_FACTORIAL = 170
ZERO = 1e-12
"""An answer so small equals a reference of 0."""
_SAME = 1e-30
_NUM_POINTS = 6

_context: Any = mpmath.mp.clone()
_context.dps = 50
Value = Any  # Fraction, or a real or complex number of mpmath


class Undefined(ValueError):
    """A formula has no value at a point: division by zero, the logarithm of zero."""


def evaluate(node: Node, at: Mapping[str, Fraction] = {}) -> Value:
    """The value of a formula.

    Args:
        node: as parsed; its depth is bounded.
        at: the value of each symbol.

    Returns:
        A Fraction where all steps are rational, else a number of 50 digits, real or complex.

    Raises:
        TooLarge: a value on the way is beyond the limits.
        Undefined: there is no value, or a symbol has none.
    """
    if node.kind == "number":
        return node.value
    if node.kind == "symbol":
        if node.name not in at:
            raise Undefined(f"no value for {node.name}")
        return at[node.name]
    if node.kind == "constant":
        return {"pi": +_context.pi, "e": +_context.e, "i": _context.mpc(0, 1)}[node.name]
    values = [evaluate(part, at) for part in node.args]
    try:
        return _bounded(_apply(node, values))
    except (ZeroDivisionError, OverflowError, ValueError) as error:
        if isinstance(error, TooLarge | Undefined):
            raise
        raise Undefined(str(error)) from None


def _apply(node: Node, values: Sequence[Value]) -> Value:
    kind = node.kind
    if kind == "sum":
        total = values[0]
        for value in values[1:]:
            total = _bounded(_both(total, value, lambda a, b: a + b))
        return total
    if kind == "product":
        total = values[0]
        for value in values[1:]:
            total = _bounded(_both(total, value, lambda a, b: a * b))
        return total
    if kind == "negative":
        return -values[0]
    if kind == "inverse":
        if values[0] == 0:
            raise Undefined("division by zero")
        return 1 / values[0]
    if kind == "power":
        return _power(values[0], values[1])
    if kind == "root":
        return _root(values[0], values[1])
    return _call(node.name, values)


def _power(base: Value, exponent: Value) -> Value:
    if base == 0:
        if isinstance(exponent, Fraction) and exponent > 0:
            return Fraction(0)
        raise Undefined("zero to a power that is not positive")
    whole = isinstance(exponent, Fraction) and exponent.denominator == 1
    if whole and isinstance(base, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(exponent.numerator) <= MAX_BITS:
            return base**exponent.numerator
    # Refused before it is computed.
    magnitude = abs(_float(base))
    if abs(_context.log(magnitude, 2)) * abs(_float(exponent)) > MAX_MAGNITUDE:
        raise TooLarge("a power beyond all limits")
    return _context.power(_float(base), exponent.numerator if whole else _float(exponent))


def _root(value: Value, index: Value) -> Value:
    if not (isinstance(index, Fraction) and index.denominator == 1 and 2 <= index <= 100):
        raise Undefined("a root that is not the 2nd to 100th")
    real = isinstance(value, Fraction) or not _context.im(value)
    if index % 2 and real and _float(value) < 0:
        return -_context.root(-_float(value), int(index))
    return _context.sqrt(_float(value)) if index == 2 else _context.root(_float(value), int(index))


_REAL: dict[str, Callable[[Any], Any]] = {
    "sin": _context.sin, "cos": _context.cos, "tan": _context.tan, "cot": _context.cot, "sec": _context.sec,
    "csc": _context.csc, "asin": _context.asin, "acos": _context.acos, "atan": _context.atan, "sinh": _context.sinh,
    "cosh": _context.cosh, "tanh": _context.tanh, "exp": _context.exp, "sqrt": _context.sqrt,
}  # fmt: skip


def _call(name: str, values: Sequence[Value]) -> Value:
    value = values[0]
    if name == "abs":
        return abs(value)
    if name == "factorial":
        if not (isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= MAX_FACTORIAL):
            raise TooLarge(f"the factorial of something else than 0 to {MAX_FACTORIAL}")
        return Fraction(int(_context.factorial(int(value)))) if value < 30 else _context.factorial(int(value))
    number = _float(value)
    if name in ("ln", "log"):
        if number == 0:
            raise Undefined("the logarithm of zero")
        base = _float(values[1]) if len(values) > 1 else _context.mpf(10) if name == "log" else _context.e
        if base in (0, 1):
            raise Undefined("a logarithm to base 0 or 1")
        return _context.log(number) / _context.log(base)
    if abs(number) > 2**14:
        raise TooLarge(f"{name} of a number above {2**14}")
    return _REAL[name](number)


def _both(a: Value, b: Value, operation: Callable[[Any, Any], Any]) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return operation(a, b)
    return operation(_float(a), _float(b))


def _float(value: Value) -> Any:
    return _context.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _bounded(value: Value) -> Value:
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) <= MAX_BITS:
            return value
        value = _float(value)
    if not _context.isfinite(value):
        raise Undefined("not a finite number")
    if value and abs(_context.mag(value)) > MAX_MAGNITUDE:
        raise TooLarge("a value beyond all limits")
    return value


def close(value: Value, reference: Value, tolerance: float) -> bool:
    """Whether a value is the reference's, within a relative tolerance."""
    if isinstance(value, Fraction) and isinstance(reference, Fraction):
        if reference == 0:
            return abs(value) <= Fraction(ZERO)
        return abs(value - reference) <= Fraction(tolerance) * abs(reference)
    size, gap = abs(_float(reference)), abs(_float(value) - _float(reference))
    return bool(gap <= (ZERO if size <= ZERO else tolerance * size + _SAME * size))


def points(symbols: frozenset[str]) -> list[dict[str, Fraction]]:
    """The points at which formulas are compared: the first half positive, the same ones in every process."""
    names = sorted(symbols)
    draw = random.Random(20250701)
    found = []
    for number in range(_NUM_POINTS):
        negative = (
            number - _NUM_POINTS // 2
        )  # the first of the second half has all symbols below zero, the others every other one
        signs = [-1 if negative == 0 or (negative > 0 and (place + negative) % 2) else 1 for place in range(len(names))]
        found.append({name: Fraction(sign * draw.randint(200, 1999), 1009) for name, sign in zip(names, signs, strict=True)})
    return found


def equal(answer: Node, reference: Node, tolerance: float) -> bool | None:
    """Whether two formulas are equal.

    Args:
        answer: the one to judge.
        reference: the right one.
        tolerance: relative, of values.

    Returns:
        None where this way cannot tell: too few points where both have a value, or equal at positive points only.

    Raises:
        TooLarge: a value on the way is beyond the limits.
        Undefined: a formula without symbols has no value.
    """
    symbols = answer.symbols() | reference.symbols()
    if not symbols:
        return close(evaluate(answer), evaluate(reference), tolerance)
    verdicts: list[bool | None] = []
    for point in points(symbols):
        try:
            verdicts.append(close(evaluate(answer, point), evaluate(reference, point), tolerance))
        except Undefined:
            verdicts.append(None)
    positive, others = verdicts[: _NUM_POINTS // 2], verdicts[_NUM_POINTS // 2 :]
    if False in positive:
        return False
    if False in others or positive.count(True) < 2:
        return None
    return True
