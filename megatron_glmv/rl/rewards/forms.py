"""What a final answer is made of: one value, several values, an interval, an equation; and whether two such are equal.

`expression` reads single formulas; lists, sets, tuples, intervals, unions, plus-minus and relations around them are read here,
by splitting at marks outside of brackets.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Literal

from megatron_glmv.rl.rewards.evaluation import Undefined, equal, evaluate, points
from megatron_glmv.rl.rewards.expression import Node, NotAnExpression, parse
from megatron_glmv.rl.rewards.notation import TooLarge, number_word, plain

MAX_ITEMS = 16
MAX_DEPTH = 8

_WHOLE = re.compile(r"[+-]?\d+(?:\.0*)?")
_OPEN, _CLOSE = "([{", ")]}"
_RELATION = re.compile(r"<=|>=|!=|=|<|>|≈")
_JOINT = re.compile(r"\s+(?:and|or)\s+|\s*(?:和|或)\s*")
_MATRIX = re.compile(r"\\begin\{([pbv]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}")
_WORDS = re.compile(r"(?!.*(?:sin|cos|tan|ln|log|exp))[A-Za-z][A-Za-z\d\s/'-]*")
_NAME_IS = re.compile(r"\s*(?:\\?[A-Za-z]+(?:_\{?\w{1,8}\}?)?'?(?:\([A-Za-z, ]{1,9}\))?)\s*")

Kind = Literal["value", "list", "tuple", "union", "relation"]


@dataclass(frozen=True)
class Rule:
    """When two numbers are equal.

    Attributes:
        tolerance: relative, of values.
        wholes: of two numbers that are both written as integers.
    """

    tolerance: float
    wholes: Callable[[int, int], bool] = operator.eq


@dataclass(frozen=True)
class Form:
    """An answer's structure.

    Attributes:
        kind: one value; an unordered list; an ordered tuple or interval; a union of intervals; a relation.
        items: parts of a list, tuple or union.
        node: the formula of a value; left minus right of a relation.
        marks: brackets of a tuple, or the operator of a relation: =, <, <=, !=.
        name: left side of "name = value", where it was cut off.
        whole: the integer, where a value is written as one.
        words: the text without spaces, where a value without a name could be words: ab, red car, R2D2.
    """

    kind: Kind
    items: tuple[Form, ...] = ()
    node: Node | None = None
    marks: str = ""
    name: str = ""
    whole: int | None = None
    words: str = ""


def read(text: str) -> Form:
    """Read an answer.

    Raises:
        NotAnExpression: it is no formula, nor made of some.
        TooLarge: it is beyond the limits.
    """
    return _read(plain(text))


def _read(text: str, depth: int = 0) -> Form:
    if depth > MAX_DEPTH:
        raise TooLarge(f"values within values deeper than {MAX_DEPTH}")
    read_part = partial(_read, depth=depth + 1)
    text = _unboxed(text)
    if not text:
        raise NotAnExpression("nothing")
    if (whole := whole_number(text)) is not None:
        digits = abs(whole) < 10**100
        return Form("value", node=Node("number", value=Fraction(whole)) if digits else None, whole=whole)
    if text.startswith("\\begin{") and (matrix := _MATRIX.fullmatch(text)):
        rows = [row for row in matrix[2].split("\\\\") if row.strip()]
        return Form("tuple", _all(rows, lambda row: Form("tuple", _all(row.split("&"), read_part), marks="()")), marks="[]")
    if "±" in text:
        return _plus_minus(text, read_part)
    parts = _split(text, ",;")
    parts = parts if len(parts) > 1 else _JOINT.split(text)
    if len(parts) > 1:
        return Form("list", _all(parts, read_part))
    name, text = _cut_name(text)
    if len(parts := _split(text, "∪")) > 1:
        return Form("union", _all(parts, read_part), name=name)
    if (group := _group(text, read_part)) is not None:
        return Form(group.kind, group.items, group.node, group.marks, name)
    if found := _RELATION.search(text):
        return _relation(text[: found.start()], found[0], text[found.end() :])
    node = parse(text)
    words = "".join(text.split()) if not name and _WORDS.fullmatch(text) else ""
    return Form("value", node=node, name=name, words=words)


def _all(parts: list[str], read_part: Callable[[str], Form]) -> tuple[Form, ...]:
    if len(parts) > MAX_ITEMS:
        raise TooLarge(f"{len(parts)} values, more than {MAX_ITEMS}")
    return tuple(read_part(part.strip()) for part in parts)


def whole_number(text: str) -> int | None:
    """The value of a plain integer of up to `MAX_CHARACTERS` digits: 42, -7, 42.0, forty-two; None for everything else."""
    text = text.strip()
    if _WHOLE.fullmatch(text):
        return int(text.partition(".")[0])
    return number_word(text) if len(text) < 40 else None


def _unboxed(text: str) -> str:
    text = text.strip()
    while text.startswith("\\boxed{") and text.endswith("}"):
        text = text[len("\\boxed{") : -1].strip()
    return text


def _cut_name(text: str) -> tuple[str, str]:
    """("x", "5") of "x = 5" and of "x ∈ (0, 1)"; ("", text) where the left side is more than a name."""
    for mark in ("=", "≈", "∈"):
        left, found, right = text.partition(mark)
        if not found or (mark == "=" and left[-1:] in "<>!"):
            continue
        if not left.strip() or _NAME_IS.fullmatch(left):
            return "".join(left.replace("\\", "").split()), _last_side(right)
    return "", text


def _last_side(text: str) -> str:
    """Y = 2 * 3 = 6: the last side."""
    sides = [side.strip() for side in re.split(r"(?<![<>!])=|≈", text)]
    return sides[-1] if all(sides) else text.strip()


def _plus_minus(text: str, read_part: Callable[[str], Form]) -> Form:
    if text.count("±") != 1:
        raise NotAnExpression("more than one plus-minus")
    name, text = _cut_name(text)
    return Form("list", (read_part(text.replace("±", "+")), read_part(text.replace("±", "-"))), name=name)


def _split(text: str, marks: str) -> list[str]:
    """Split at marks outside of all brackets."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if character in marks and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]


def _group(text: str, read_part: Callable[[str], Form]) -> Form | None:
    r"""(a, b), [a, b), \{a, b\}, {a, b}: one bracket around several values; None for everything else."""
    is_set = text.startswith("\\{") and text.endswith("\\}")
    inner = text[2:-2] if is_set else text[1:-1]
    if len(text) < 2 or not (is_set or (text[0] in _OPEN and text[-1] in _CLOSE)):
        return None
    depth = 0
    for character in inner:
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth < 0:
            return None
    parts = _split(inner, ",;")
    if is_set or (text[0] == "{" and len(parts) > 1):
        return Form("list", _all(parts, read_part))
    return Form("tuple", _all(parts, read_part), marks=text[0] + text[-1]) if len(parts) > 1 else None


def _relation(left: str, sign: str, right: str) -> Form:
    """Left minus right, with > turned into <."""
    if _RELATION.search(right):
        raise NotAnExpression("two relations in one")
    sides = (parse(left), parse(right))
    if sign in (">", ">="):
        sides, sign = (sides[1], sides[0]), sign.replace(">", "<")
    difference = Node("sum", (sides[0], Node("negative", (sides[1],))))
    return Form("relation", node=difference, marks=sign)


def same(answer: Form, reference: Form, rule: Rule) -> bool | None:
    """Whether two answers are equal; None where this cannot tell.

    Raises:
        TooLarge, Undefined: a value is beyond the limits, or there is none.
    """
    if answer.name and reference.name and answer.name != reference.name:
        return False
    if {answer.kind, reference.kind} == {"value", "relation"}:
        answer, reference = _as_relation(answer), _as_relation(reference)
    if answer.kind != reference.kind or len(answer.items) != len(reference.items):
        return False
    if answer.kind == "value":
        return _same_value(answer, reference, rule)
    if answer.kind == "relation":
        return _same_relation(answer, reference, rule)
    if answer.kind == "tuple":
        if answer.marks != reference.marks:
            return False
        return _every([same(a, b, rule) for a, b in zip(answer.items, reference.items, strict=True)])
    return _same_unordered(answer.items, reference.items, rule)


def _same_value(answer: Form, reference: Form, rule: Rule) -> bool | None:
    if answer.whole is not None and reference.whole is not None:
        return rule.wholes(answer.whole, reference.whole)
    if answer.node is None or reference.node is None:
        raise TooLarge("a number of more than 100 digits")
    verdict = equal(answer.node, reference.node, rule.tolerance)
    # Letters commute in formulas and not in words: ba is ab, but on is not no.
    moved = answer.words and reference.words and answer.words != reference.words
    return None if verdict and moved else verdict


def _as_relation(form: Form) -> Form:
    """Y = 2x + 1 as y - (2x + 1) = 0; everything else as it is."""
    if form.kind != "value" or not form.name or form.node is None:
        return form
    try:
        left = parse(form.name)
    except NotAnExpression:
        return form
    return Form("relation", node=Node("sum", (left, Node("negative", (form.node,)))), marks="=")


def _same_unordered(answers: tuple[Form, ...], references: tuple[Form, ...], rule: Rule) -> bool | None:
    """Whether the answers are the references in any order; in the same one, if names that only one side has tell them apart."""
    named, wanted = ({item.name for item in items if item.name} for items in (answers, references))
    if named != wanted and max(len(named), len(wanted)) > 1:
        return _every([same(a, b, rule) for a, b in zip(answers, references, strict=True)]) or None
    left, unclear = list(references), False
    for item in answers:
        verdicts = [same(item, other, rule) for other in left]
        if True not in verdicts:
            if None not in verdicts:
                return False
            unclear = True
            continue
        del left[verdicts.index(True)]
    return None if unclear else True


def _every(verdicts: list[bool | None]) -> bool | None:
    return False if False in verdicts else None if None in verdicts else True


def _same_relation(answer: Form, reference: Form, rule: Rule) -> bool | None:
    """Equal up to a factor that is the same everywhere, and positive for inequalities."""
    if answer.marks != reference.marks or answer.node is None or reference.node is None:
        return False
    ratios = []
    for point in points(answer.node.symbols() | reference.node.symbols()):
        try:
            ratios.append((evaluate(answer.node, point), evaluate(reference.node, point)))
        except Undefined:
            continue
    ratios = [(a, b) for a, b in ratios if b != 0]
    if len(ratios) < 3 or ratios[0][0] == 0:
        return None
    first_a, first_b = ratios[0]
    for a, b in ratios[1:]:
        left, right = _product(a, first_b), _product(b, first_a)
        if abs(left - right) > max(rule.tolerance, 1e-9) * abs(right):
            return False
    factor = complex(first_a) / complex(first_b)
    return factor.real > 0 if "<" in answer.marks else True


def _product(a: object, b: object) -> complex:
    return complex(a) * complex(b)  # type: ignore[call-overload]
