"""Reading and comparing formulas and quantities: pairs that are equal, pairs that are not, texts that are refused."""

from __future__ import annotations

import contextlib
import random
import time
from fractions import Fraction

import pytest
import sympy

from megatron_glmv.rl.rewards import units
from megatron_glmv.rl.rewards.evaluation import Undefined, close, evaluate
from megatron_glmv.rl.rewards.expression import Node, NotAnExpression, parse
from megatron_glmv.rl.rewards.forms import Rule, read, same
from megatron_glmv.rl.rewards.notation import TooLarge, folded, number_word, plain
from megatron_glmv.rl.rewards.units import read_quantity

EQUAL = [
    ("42.0", "42"),
    ("1,234.5", "1234.5"),
    (r"1\,234\,567", "1234567"),
    ("1{,}234", "1234"),
    (r"\frac{1}{2}", ".5"),
    (r"\frac12", "0.5"),
    (r"\tfrac{3}{4}", "75%"),
    ("½", "0.5"),
    ("1½", "1.5"),
    ("1 1/2", "1.5"),
    (r"-\frac{1}{2}", "-0.5"),
    (r"1\frac{1}{2}", "1.5"),
    ("３．５", "3.5"),
    ("−3", "-3"),
    ("2·3", "6"),
    (r"2\times 3", "6"),
    ("6÷2", "3"),
    ("1e3", "1000"),
    (r"6.02\times10^{23}", "6.02e23"),
    ("10²", "100"),
    ("10⁻²", "0.01"),
    (r"\sqrt{8}", r"2\sqrt2"),
    ("√16", "4"),
    (r"\sqrt[3]{-8}", "-2"),
    ("2π", "6.283185307"),
    (r"30^\circ", r"\frac{\pi}{6}"),
    (r"e^{i\pi}", "-1"),
    (r"\log_2 8", "3"),
    (r"\log 100", "2"),
    (r"\ln e^2", "2"),
    ("5!", "120"),
    ("|-3|", "3"),
    (r"\left|x\right|", "|x|"),
    ("-2^2", "-4"),
    ("2^-1", "0.5"),
    ("2^3^2", "512"),
    ("1/2x", "x/2"),
    ("2xy", "2 y x"),
    ("x_1+x_2", "x_2+x_1"),
    (r"\frac{ab}{a+b}", "1/(1/a+1/b)"),
    (r"\sin 2x", r"2\sin x\cos x"),
    (r"\cos^2x", r"1-\sin^2x"),
    (r"\tan x", r"\frac{\sin x}{\cos x}"),
    ("e^x", r"\exp(x)"),
    ("(x+1)(x-1)", "x^2-1"),
    ("x=5", "5"),
    ("x = 5", "x=5"),
    ("f(x)=x^2", "x^2"),
    ("x^2+y^2=1", "2x^2+2y^2=2"),
    ("x>5", "5<x"),
    (r"x \ge 2", "2x>=4"),
    ("{1,2}", r"\{2,1\}"),
    ("1 and 2", "2, 1"),
    ("(1, 2)", r"\left(1,2\right)"),
    ("[0,5)", r"x\in[0,5)"),
    (r"(-\infty, 2] \cup [3, \infty)", "(-∞,2]∪[3,+∞)"),
    (r"\pm 2", "2 or -2"),
    (r"\boxed{7}", "7"),
    ("$7$", "7"),
    (r"\(7\)", "7"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    ("three", "3"),
    ("二十一", "21"),
    ("0", "-0.0"),
    (r"\text{5}", "5"),
    ("2(3)", "6"),
    ("y = 2 * 3 = 6", "6"),
    ("θ/2", r"\frac{\theta}{2}"),
]
DIFFERENT = [
    ("1000000", "1000001"),
    ("x=5", "y=5"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "[0,1]"),
    ("x>5", "x>=5"),
    ("x>5", "x<5"),
    ("x", "y"),
    ("a", "A"),
    ("1,2", "1,2,3"),
    ("3 or 4", "3"),
    ("1,234", "(1,234)"),
    ("2x", "x^2"),
    ("x^2+y^2=1", "x^2+y^2=2"),
    ("1/3", "0.333"),
    ("0.001", "0"),
    (r"\log 2", r"\ln 2"),
    ("2^10", "1023"),
    ("(1,2)", "1,2"),
    ("9" * 60 + "0", "9" * 60 + "1"),
    ("12", "1 2/1"),
]
UNSURE = [(r"\sqrt{x^2}", "x"), ("|x|", "x"), (r"\ln x^2", r"2\ln x")]
REFUSED = [
    ("hello", NotAnExpression),
    ("", NotAnExpression),
    ("__import__('os')", NotAnExpression),
    ("1 +", NotAnExpression),
    ("(1", NotAnExpression),
    ("1 2", NotAnExpression),
    (r"\foo{1}", NotAnExpression),
    ("x==1", NotAnExpression),
    ("lambda: 0", NotAnExpression),
    ("1;", None),
    ("9**9**9**9", TooLarge),
    ("1e99999", TooLarge),
    ("171!", TooLarge),
    ("(" * 50 + "1" + ")" * 50, TooLarge),
    ("2" + "^2" * 60, TooLarge),
    ("1+" * 500 + "1", TooLarge),
    ("1" * 3000, TooLarge),
    ("10^{10^{10}}", TooLarge),
    (r"\exp(10^9)", TooLarge),
    (r"\sin(10^{99})", TooLarge),
    ("1/0", Undefined),
    ("0^{-1}", Undefined),
    (r"\ln 0", Undefined),
    ("9." + "9" * 200, TooLarge),
    ("1," * 20 + "1", TooLarge),
    (r"\sqrt[0]{2}", Undefined),
]


def verdict(a: str, b: str, tolerance: float = 1e-6) -> bool | None:
    return same(read(a), read(b), Rule(tolerance))


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal(a: str, b: str):
    assert verdict(a, b) is True
    assert verdict(b, a) is True


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different(a: str, b: str):
    assert verdict(a, b) is False
    assert verdict(b, a) is False


@pytest.mark.parametrize(("a", "b"), UNSURE)
def test_equal_for_positive_values_only_is_not_decided(a: str, b: str):
    assert verdict(a, b) is None


@pytest.mark.parametrize(("text", "error"), REFUSED)
def test_refused(text: str, error: type[Exception] | None):
    start = time.process_time()
    if error is None:
        assert verdict(text, "1")
    else:
        with pytest.raises(error):
            verdict(text, "0.5")
    assert time.process_time() - start < 0.5


def test_values_agree_with_sympy_on_random_trees():
    """Our own trees, never texts, go to sympy: the values of 200 random formulas are the same to 30 digits."""
    draw = random.Random(5)
    for _ in range(200):
        tree, theirs = random_tree(draw, 4)
        try:
            ours = evaluate(tree)
        except (Undefined, TooLarge):
            continue
        theirs = complex(sympy.N(theirs, 30))
        assert complex(ours) == pytest.approx(theirs, rel=1e-12, abs=1e-12)


def random_tree(draw: random.Random, depth: int) -> tuple[Node, sympy.Expr]:
    if depth == 0 or draw.random() < 0.2:
        value = Fraction(draw.randint(1, 9), draw.randint(1, 5))
        return Node("number", value=value), sympy.Rational(value.numerator, value.denominator)
    (a, theirs_a), (b, theirs_b) = random_tree(draw, depth - 1), random_tree(draw, depth - 1)
    kind = draw.choice(["sum", "product", "power", "root", "call", "negative", "inverse"])
    if kind == "sum":
        return Node("sum", (a, b)), theirs_a + theirs_b
    if kind == "product":
        return Node("product", (a, b)), theirs_a * theirs_b
    if kind == "power":
        exponent = draw.randint(-3, 3)
        return Node("power", (a, Node("number", value=Fraction(exponent)))), theirs_a**exponent
    if kind == "root":
        return Node("root", (Node("call", (a,), "abs"), Node("number", value=Fraction(2)))), sympy.sqrt(sympy.Abs(theirs_a))
    if kind == "call":
        name = draw.choice(["sin", "cos", "atan"])
        return Node("call", (a,), name), getattr(sympy, name)(theirs_a)
    return (Node("negative", (a,)), -theirs_a) if kind == "negative" else (Node("inverse", (a,)), 1 / theirs_a)


def test_random_texts_raise_nothing_else_and_take_no_time():
    draw = random.Random(7)
    pieces = [
        *"0123456789+-*/^()[]{}|!%,.;=<>xyei_ '",
        r"\frac",
        r"\sqrt",
        r"\pi",
        r"\sin",
        r"\log",
        "±",
        "∪",
        "**",
        "10",
        "²",
        "½",
    ]
    slowest = 0.0
    for _ in range(3000):
        text = "".join(draw.choice(pieces) for _ in range(draw.choice([2, 5, 10, 30])))
        start = time.process_time()
        with contextlib.suppress(NotAnExpression, TooLarge, Undefined):
            verdict(text, "x+1")
        slowest = max(slowest, time.process_time() - start)
    assert slowest < 0.5


QUANTITIES = [
    ("3 m", "300 cm"),
    ("3m", "3 m"),
    ("36 km/h", "10 m/s"),
    ("1 kg m^2/s^2", "1 J"),
    ("8.314 J/(mol K)", r"8.314 J\cdot mol^{-1} K^{-1}"),
    ("5 eV", "8.01088317e-19 J"),
    ("25 °C", "298.15 K"),
    ("25 ℃", "298.15 K"),
    ("32 °F", "0 °C"),
    ("2 min", "120 s"),
    ("0.6c", "1.798755e8 m/s"),
    ("5 meters per second", "5 m/s"),
    ("9.8 m/s²", "9.8 m/s^2"),
    ("1.5 mol/L", "1.5 M"),
    ("5 kΩ", "5000 ohms"),
    ("1 cm^3", "1 mL"),
    (r"10\,\mu\text{m}", "1e-5 m"),
    (r"\frac{1}{2}\ \mathrm{kg}", "500 g"),
    ("F = 12 N", "12 N"),
    ("5 N·m", "5 J"),
    ("100 kPa", "1 bar"),
    ("2 kWh", "7.2 MJ"),
    ("1 L", "1 dm^3"),
    ("90°", r"\pi/2 rad"),
    ("1 nm", "10 Å"),
    ("50 %", "0.5 m/m"),
    ("10 mA", "0.01 A"),
    ("5 mm", "0.5cm"),
]


@pytest.mark.parametrize(("a", "b"), QUANTITIES)
def test_equal_quantities(a: str, b: str):
    left, right = read_quantity(a), read_quantity(b)
    assert close(left.value, right.value, 1e-6)
    assert left.dimension == right.dimension


@pytest.mark.parametrize(
    ("a", "b"), [("1 m", "1 mm"), ("1 Pa", "1 N"), ("5 min", "5 m"), ("1 mol", "1 m"), ("1 MJ", "1 mJ"), ("1 T", "1 t")]
)
def test_other_quantities(a: str, b: str):
    left, right = read_quantity(a), read_quantity(b)
    assert left.dimension != right.dimension or not close(left.value, right.value, 1e-6)


@pytest.mark.parametrize("text", ["3 apples", "m", "", "3 m^0", "x m", "3 m^99", "3 " + "m" * 99])
def test_no_quantity(text: str):
    with pytest.raises((NotAnExpression, TooLarge)):
        read_quantity(text)


def test_the_table_of_units_is_complete():
    assert len(units.UNITS) > 60
    assert all(unit.factor > 0 and len(unit.dimension) == len(units.BASES) for unit in units.UNITS.values())


def test_a_long_sum_is_not_a_deep_tree():
    assert evaluate(parse("+".join(["1"] * 300))) == 300


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("seven", 7),
        ("Twenty-one", 21),
        ("one hundred and five", 105),
        ("十二", 12),
        ("二十", 20),
        ("一百零五", 105),
        ("两", 2),
        ("zero", 0),
        ("one two", None),
        ("one twenty", None),
        ("and", None),
        ("", None),
        ("hundred", None),
        ("三四", None),
        ("cat", None),
    ],
)
def test_number_words(text: str, value: int | None):
    assert number_word(text) == value


def test_spellings():
    assert folded(' The "Eiffel  Tower". ') == "eiffel tower"
    assert folded("a") == "a"
    assert folded("ＡＢＣ。") == "abc"
    assert plain(r"$\dfrac{1}{2}\,\text{ cm}$.") == r"\frac{1}{2} cm"
