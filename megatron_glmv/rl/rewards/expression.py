"""A parser of formulas: text to a small tree, with limits on length, depth, size and digits.

Model output must not reach anything that evaluates text (sympy's sympify and parse_expr call eval), so this reads a fixed
grammar of numbers, symbols, a list of functions, + - * / ^ ! % and brackets, and refuses everything else. It builds a tree and
computes nothing; `evaluation` does, with limits of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from megatron_glmv.rl.rewards.notation import TooLarge

MAX_DEPTH = 40
MAX_NODES = 400
MAX_DIGITS = 120
MAX_EXPONENT = 400

Kind = Literal["number", "constant", "symbol", "sum", "product", "negative", "inverse", "power", "root", "call"]

FUNCTIONS = {
    "sin": "sin", "cos": "cos", "tan": "tan", "cot": "cot", "sec": "sec", "csc": "csc", "arcsin": "asin", "arccos": "acos",
    "arctan": "atan", "asin": "asin", "acos": "acos", "atan": "atan", "sinh": "sinh", "cosh": "cosh", "tanh": "tanh",
    "ln": "ln", "log": "log", "lg": "log", "exp": "exp", "sqrt": "sqrt", "abs": "abs",
}  # fmt: skip
"""Names of functions -> what `evaluation` calls them. log without a base is the decimal one."""
CONSTANTS = {"pi": "pi", "e": "e", "i": "i"}
_LETTERS = frozenset(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "rho",
        "sigma",
        "tau",
        "phi",
        "chi",
        "psi",
        "omega",
        "infty",
    ]
)


class NotAnExpression(ValueError):
    """The text is not a formula of the grammar."""


@dataclass(frozen=True, slots=True)
class Node:
    """A formula.

    Attributes:
        kind: what it is.
        args: its parts.
        name: of a symbol, constant or function.
        value: of a number.
    """

    kind: Kind
    args: tuple[Node, ...] = ()
    name: str = ""
    value: Fraction = Fraction(0)

    def symbols(self) -> frozenset[str]:
        """Names of all symbols in it."""
        if self.kind == "symbol":
            return frozenset((self.name,))
        return frozenset[str]().union(*(part.symbols() for part in self.args))


_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)"
    r"|\\(?P<command>[A-Za-z]+)|(?P<name>[A-Za-z]+|[αβγδεζηθκλμνξρστφχψωΩ])|(?P<mark>\*\*|[-+*/^!%°()\[\]{}|_']))"
)


def parse(text: str) -> Node:
    """Read a formula in the spelling of `notation.plain`.

    Raises:
        NotAnExpression: it is not one of the grammar.
        TooLarge: it is deeper, or has more parts or digits, than what is looked at.
    """
    return _Parser(_tokens(text)).whole()


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    at = 0
    text = text.strip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise NotAnExpression(f"character {text[at]!r} at {at}")
        kind = found.lastgroup or ""
        token = found[kind]
        if kind == "name":
            tokens += [("name", part) for part in _letters(token)]
        else:
            if kind == "number" and at == found.start(kind) and _is_symbol(tokens):
                # x1 and the H2 of H2O are names: read as x * 1, CO2 would be C2O.
                tokens.append(("mark", "_"))
            tokens.append((kind, "^" if token == "**" else token))
        at = found.end()
    if len(tokens) > 3 * MAX_NODES:
        raise TooLarge(f"{len(tokens)} parts, more than {3 * MAX_NODES}")
    return tokens


def _is_symbol(tokens: list[tuple[str, str]]) -> bool:
    """Whether the last token is a letter that stands for itself."""
    kind, token = tokens[-1] if tokens else ("", "")
    return kind == "name" and token not in FUNCTIONS and token not in CONSTANTS


def _letters(word: str) -> list[str]:
    """A run of letters: a function or Greek name, or one to three symbols side by side; longer ones are words, not formulas."""
    if word.lower() in FUNCTIONS and word[1:].islower():
        return [word.lower()]
    if word in _LETTERS or word == "pi":
        return [word]
    for name in ("sin", "cos", "tan", "ln", "pi"):
        if word.startswith(name) and len(word) - len(name) == 1:
            return [name, word[len(name) :]]
    if len(word) > 3:
        raise NotAnExpression(f"the word {word[:40]!r}")
    return list(word)


class _Parser:
    """Recursive descent over the tokens; `self.depth` bounds the recursion, `self.nodes` the tree."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens = tokens
        self.at = self.depth = self.nodes = self.bars = 0

    def whole(self) -> Node:
        """The tree of all tokens.

        Raises:
            NotAnExpression: they are no formula, or one with something behind it.
            TooLarge: deeper, or of more parts, than the limits.
        """
        tree = self.sum()
        if self.at < len(self.tokens):
            raise NotAnExpression(f"unexpected {self.peek()!r}")
        return tree

    def peek(self) -> str:
        """The next token, or nothing at the end."""
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def kind(self) -> str:
        """Of the next token: number, name, command, mark, end."""
        return self.tokens[self.at][0] if self.at < len(self.tokens) else "end"

    def take(self, wanted: str = "") -> str:
        """Step over the next token, which must be `wanted` where something is."""
        token = self.peek()
        if not token or (wanted and token != wanted):
            raise NotAnExpression(f"{wanted or 'something'} is missing")
        self.at += 1
        return token

    def node(self, kind: Kind, *args: Node, name: str = "", value: Fraction = Fraction(0)) -> Node:
        """A counted node: every one of the tree is made here."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise TooLarge(f"more than {MAX_NODES} parts")
        return Node(kind, args, name, value)

    def deeper(self) -> None:
        """One level down; whoever calls it comes up again by itself."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooLarge(f"deeper than {MAX_DEPTH}")

    def sum(self) -> Node:
        """Sum = product (("+" | "-") product)*."""
        terms = [self.product()]
        while self.kind() == "mark" and self.peek() in "+-":
            minus = self.take() == "-"
            term = self.product()
            terms.append(self.node("negative", term) if minus else term)
        return terms[0] if len(terms) == 1 else self.node("sum", *terms)

    def product(self) -> Node:
        """Product = signed (("*" | "/") signed | power)*: factors may stand side by side."""
        factors = [self.signed()]
        while True:
            if self.kind() == "mark" and self.peek() in "*/":
                divide = self.take() == "/"
                factor = self.signed()
                factors.append(self.node("inverse", factor) if divide else factor)
            elif self.begins_factor():
                if self.kind() == "number" and factors[-1].kind == "number":
                    raise NotAnExpression("two numbers side by side")
                mixed = factors[-1].kind == "number" and self.peek() == "frac"
                factor = self.power()
                factors[-1:] = [self.mixed(factors[-1], factor)] if mixed else [factors[-1], factor]
            else:
                return factors[0] if len(factors) == 1 else self.node("product", *factors)

    def mixed(self, whole: Node, fraction: Node) -> Node:
        r"""2\frac{1}{3} is 2 + 1/3 where all three are whole numbers, else a product."""
        numbers = [whole, *fraction.args[:1], *(fraction.args[1].args if len(fraction.args) == 2 else ())]
        is_mixed = len(numbers) == 3 and all(part.kind == "number" and part.value.denominator == 1 for part in numbers)
        return self.node("sum" if is_mixed else "product", whole, fraction)

    def begins_factor(self) -> bool:
        """Whether what follows can be multiplied with what stands before it; within bars a bar closes."""
        kind, token = self.kind(), self.peek()
        return kind in ("number", "name", "command") or (
            kind == "mark" and (token in "([{" or (token == "|" and not self.bars))
        )

    def signed(self) -> Node:
        """Signed = ("+" | "-")* power."""
        minus = False
        while self.kind() == "mark" and self.peek() in "+-":
            minus ^= self.take() == "-"
        value = self.power()
        return self.node("negative", value) if minus else value

    def power(self) -> Node:
        """Power = postfix ("^" signed)?, so powers group from the right."""
        base = self.postfix()
        if self.kind() != "mark" or self.peek() != "^":
            return base
        self.take()
        self.deeper()
        exponent = self.signed()
        self.depth -= 1
        return self.node("power", base, exponent)

    def postfix(self) -> Node:
        """Postfix = primary ("!" | "%" | "°")*."""
        value = self.primary()
        while self.kind() == "mark" and self.peek() in "!%°":
            mark = self.take()
            if mark == "!":
                value = self.node("call", value, name="factorial")
            else:
                scale = self.node("number", value=Fraction(1, 100)) if mark == "%" else self.degree()
                value = self.node("product", value, scale)
        return value

    def degree(self) -> Node:
        """One degree in radians."""
        return self.node("product", self.node("constant", name="pi"), self.node("number", value=Fraction(1, 180)))

    def primary(self) -> Node:
        """Every bracket, root, fraction and function is entered here."""
        self.deeper()
        value = self.bare()
        self.depth -= 1
        return value

    def bare(self) -> Node:
        """Bare = number | named | "|" sum "|" | bracket sum bracket."""
        kind = self.kind()
        if kind == "number":
            return self.node("number", value=_number(self.take()))
        if kind in ("name", "command"):
            return self.named(self.take(), command=kind == "command")
        opened = self.take()
        if opened == "|":
            self.bars += 1
            inner = self.sum()
            self.take("|")
            self.bars -= 1
            return self.node("call", inner, name="abs")
        if opened not in "([{":
            raise NotAnExpression(f"unexpected {opened!r}")
        bars, self.bars = self.bars, 0
        inner = self.sum()
        self.bars = bars
        self.take(")]}"["([{".index(opened)])
        return inner

    def named(self, name: str, *, command: bool) -> Node:
        """A fraction, root, function, constant or symbol; `command`: it was written with a backslash."""
        if command and name == "frac":
            above, below = self.argument(), self.argument()
            return self.node("product", above, self.node("inverse", below))
        if name == "sqrt":
            index = self.node("number", value=Fraction(2))
            if command and self.peek() == "[":
                self.take("[")
                index = self.sum()
                self.take("]")
            return self.node("root", self.argument() if command else self.primary(), index)
        if name in FUNCTIONS:
            return self.function(FUNCTIONS[name])
        if name in CONSTANTS and not self.subscripted():
            return self.node("constant", name=CONSTANTS[name])
        if command and name not in _LETTERS:
            raise NotAnExpression(f"the command \\{name}")
        return self.node("symbol", name=name + self.subscript())

    def argument(self) -> Node:
        r"""What follows \frac or \sqrt: a group, one digit, or one letter."""
        if self.kind() == "number":
            digits = self.peek()
            if len(digits) > 1 and digits.isdigit():
                # \frac12 is 1/2: LaTeX takes one digit.
                self.tokens[self.at] = ("number", digits[1:])
                return self.node("number", value=Fraction(int(digits[0])))
        return self.primary()

    def function(self, name: str) -> Node:
        """What stands behind the name: sin x, sin^2 x, log_2 x."""
        base: tuple[Node, ...] = ()
        if name == "log" and self.peek() == "_":
            self.take("_")
            base = (self.argument(),)
        power: Node | None = None
        if self.kind() == "mark" and self.peek() == "^":
            self.take("^")
            power = self.argument()
            if power.kind != "number" or power.value <= 0:
                raise NotAnExpression("a function to a power that is not a positive number")
        value = self.node("call", self.function_argument(), *base, name=name)
        return value if power is None else self.node("power", value, power)

    def function_argument(self) -> Node:
        """sin(x), or sin 2x: numbers and symbols side by side up to the next function, bracket or operator."""
        grouped = self.kind() == "mark" and self.peek() in "([{|"
        factors = [self.power() if not grouped else self.postfix()]
        while not grouped and self.kind() in ("name", "command") and self.peek() not in FUNCTIONS and self.peek() != "frac":
            factors.append(self.power())
        return factors[0] if len(factors) == 1 else self.node("product", *factors)

    def subscripted(self) -> bool:
        """Whether a subscript follows: e_1 is a symbol, e a constant."""
        return self.kind() == "mark" and self.peek() == "_"

    def subscript(self) -> str:
        """_1, _{12}, _n as part of a symbol's name, and primes."""
        name = ""
        while self.kind() == "mark" and self.peek() in "_'":
            if self.take() == "'":
                name += "'"
                continue
            if self.peek() == "{":
                self.take()
                parts: list[str] = []
                while self.peek() not in ("}", "") and len(parts) < 20:
                    parts.append(self.take())
                self.take("}")
                name += "_" + "".join(parts)
            else:
                name += "_" + self.take()
        return name


def _number(text: str) -> Fraction:
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > MAX_DIGITS:
        raise TooLarge(f"a number of {len(mantissa)} digits, more than {MAX_DIGITS}")
    if exponent and (len(exponent) > 5 or abs(int(exponent)) > MAX_EXPONENT):
        raise TooLarge(f"a power of ten beyond {MAX_EXPONENT}")
    value = Fraction(mantissa if mantissa[-1] != "." else mantissa[:-1])
    power = int(exponent or 0)
    return value * 10**power if power >= 0 else value / 10**-power
