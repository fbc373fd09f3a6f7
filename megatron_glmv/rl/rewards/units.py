"""Quantities: a number with a unit, in base units, so that 3 m is 300 cm and 36 km/h is 10 m/s.

A table of units and SI prefixes and a small reader of products, quotients and powers of them; nothing is evaluated as text.

Source: the SI brochure (9th edition, 2019), its defining constants and tables 1 to 8; CODATA 2018 for eV, u.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_glmv.rl.rewards.evaluation import Undefined, Value, evaluate
from megatron_glmv.rl.rewards.expression import Node, NotAnExpression, parse
from megatron_glmv.rl.rewards.notation import TooLarge, plain

BASES = ("m", "kg", "s", "A", "K", "mol", "cd", "rad", "dollar")
Dimension = tuple[int, ...]
"""Powers of `BASES`."""
MAX_UNIT_CHARACTERS = 60
MAX_SPLITS = 40

_PREFIXES = {
    "Y": 24, "Z": 21, "E": 18, "P": 15, "T": 12, "G": 9, "M": 6, "k": 3, "h": 2, "da": 1, "d": -1, "c": -2, "m": -3, "μ": -6,
    "u": -6, "n": -9, "p": -12, "f": -15, "a": -18,
}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """A unit: `factor` base units of `dimension`; `offset` of temperatures, in kelvin."""

    factor: Fraction
    dimension: Dimension
    offset: Fraction = Fraction(0)


@dataclass(frozen=True)
class Quantity:
    """A number with a unit.

    Attributes:
        value: in base units; a Fraction or a number of 50 digits.
        number: as written.
        dimension: None where no unit is written.
        node: the number as a formula.
    """

    value: Value
    number: Value
    dimension: Dimension | None
    node: Node


_TABLE = """
* m | 1 | m | meter metre meters metres
* g | 1e-3 | kg | gram grams
* s | 1 | s | second seconds sec secs
* A | 1 | A | ampere amperes amp amps
* K | 1 | K | kelvin kelvins
* mol | 1 | mol | mole moles mols
* cd | 1 | cd
* Hz | 1 | s-1 | hertz
* N | 1 | m kg s-2 | newton newtons
* J | 1 | m2 kg s-2 | joule joules
* Pa | 1 | m-1 kg s-2 | pascal pascals
* W | 1 | m2 kg s-3 | watt watts
* C | 1 | s A | coulomb coulombs
* V | 1 | m2 kg s-3 A-1 | volt volts
* F | 1 | m-2 kg-1 s4 A2 | farad farads
* Ω | 1 | m2 kg s-3 A-2 | ohm ohms
* S | 1 | m-2 kg-1 s3 A2
* Wb | 1 | m2 kg s-2 A-1 | weber webers
* T | 1 | kg s-2 A-1 | tesla teslas
* H | 1 | m2 kg s-2 A-2 | henry henries
* lm | 1 | cd
* lx | 1 | m-2 cd
* Bq | 1 | s-1
* Gy | 1 | m2 s-2
* Sv | 1 | m2 s-2
* kat | 1 | s-1 mol
* L | 1e-3 | m3 | liter litre liters litres
* l | 1e-3 | m3
* eV | 1.602176634e-19 | m2 kg s-2 | electronvolt electronvolts
* bar | 1e5 | m-1 kg s-2
* cal | 4.184 | m2 kg s-2 | calorie calories
* Wh | 3600 | m2 kg s-2
* M | 1000 | m-3 mol
* rad | 1 | rad | radian radians
* sr | 1 | 1
* u | 1.66053906660e-27 | kg
* t | 1000 | kg | ton tons tonne tonnes
  min | 60 | s | minute minutes mins
  h | 3600 | s | hour hours hrs
  hr | 3600 | s
  d | 86400 | s | day days
  yr | 31557600 | s | year years
  atm | 101325 | m-1 kg s-2 | atmosphere atmospheres
  mmHg | 133.322387415 | m-1 kg s-2
  torr | 133.322368421 | m-1 kg s-2
  Å | 1e-10 | m | angstrom angstroms
  in | 0.0254 | m | inch inches
  ft | 0.3048 | m | foot feet
  yd | 0.9144 | m
  mi | 1609.344 | m | mile miles
  mph | 0.44704 | m s-1
  lb | 0.45359237 | kg | pound pounds lbs
  oz | 0.028349523125 | kg
  ha | 1e4 | m2
  amu | 1.66053906660e-27 | kg
  Da | 1.66053906660e-27 | kg
  c | 299792458 | m s-1
  rpm | 1/60 | s-1
  ly | 9460730472580800 | m
  ml | 1e-6 | m3
  ° | 0.017453292519943295769 | rad | degree degrees
  deg | 0.017453292519943295769 | rad
  rev | 6.2831853071795864769 | rad
  % | 0.01 | 1 | percent
  ppm | 1e-6 | 1
  dollar | 1 | dollar | dollars USD usd
  cent | 0.01 | dollar | cents
"""
"""Name, base units in one, powers of base units, other names; a star: takes prefixes."""
_SPELLED = """
kg kilogram kilograms kilo kilos
cm centimeter centimetre centimeters centimetres
mm millimeter millimetre millimeters millimetres
km kilometer kilometre kilometers kilometres
nm nanometer nanometers nanometre nanometres
μm micrometer micrometers micron microns
mL milliliter milliliters millilitre millilitres
kJ kilojoule kilojoules
M molar
°C celsius degC ℃
°F fahrenheit degF ℉
"""


def _read_table() -> tuple[dict[str, Unit], frozenset[str], dict[str, str]]:
    """Units by name, the names that take prefixes, and other names -> names."""
    units: dict[str, Unit] = {}
    aliases: dict[str, str] = {}
    prefixed = set()
    for line in _TABLE.strip().splitlines():
        name, factor, powers, *others = (part.strip() for part in line[2:].split(" | "))
        found = {base: int(power or 1) for base, power in re.findall(r"([A-Za-z]+)(-?\d*)", powers)}
        units[name] = Unit(Fraction(factor), tuple(found.get(base, 0) for base in BASES))
        if line[0] == "*":
            prefixed.add(name)
        aliases |= dict.fromkeys(" ".join(others).split(), name)
    kelvin = units["K"].dimension
    units["°C"] = Unit(Fraction(1), kelvin, Fraction("273.15"))
    units["°F"] = Unit(Fraction(5, 9), kelvin, Fraction("273.15") - 32 * Fraction(5, 9))
    aliases |= {other: line.split()[0] for line in _SPELLED.strip().splitlines() for other in line.split()[1:]}
    return units, frozenset(prefixed), aliases


UNITS, _TAKE_PREFIX, _ALIASES = _read_table()
_UNIT_TOKEN = re.compile(
    r"\s*(?:(?P<name>°\s?[CF](?![A-Za-z])|[A-Za-zμΩÅ℃℉]+|[°%])|(?P<power>\^?\{?\s*([+-]?\d{1,2})\s*\}?)|(?P<mark>\*\*|[*/()]))"
)
_NUMBER_ENDS = re.compile(r"(?<=[\d)}\]i])\s*(?=[A-Za-zμΩÅ°%℃℉\\])")


def read_unit(text: str) -> Unit:
    """Read a unit: m, km/h, kg m^2 s^-2, J/(mol K), °C.

    Raises:
        NotAnExpression: it is not one.
    """
    text = " ".join(text.replace("\\", " ").replace("μ ", "μ").split())
    if not text or len(text) > MAX_UNIT_CHARACTERS:
        raise NotAnExpression("no unit")
    alone = _named(text.replace(" ", "") if text.startswith("°") else text)
    if alone is not None:
        return alone
    return _product_of(text.replace(" per ", " / ").replace("squared", "^2").replace("cubed", "^3"))


def _product_of(text: str) -> Unit:
    """Products, quotients and powers; a bracket may follow a slash."""
    factor, powers = Fraction(1), [0] * len(BASES)
    sign, at, last, in_bracket = 1, 0, None, False
    next_sign = 1
    while at < len(text):
        found = _UNIT_TOKEN.match(text, at)
        if found is None:
            raise NotAnExpression(f"character {text[at]!r} in a unit")
        at = found.end()
        if found["name"]:
            unit = _named(found["name"].replace(" ", ""))
            if unit is None:
                raise NotAnExpression(f"the unit {found['name']!r}")
            sign = next_sign
            factor, powers, last = _times(factor, powers, unit, sign), _added(powers, unit, sign), unit
            next_sign = sign if in_bracket else 1
        elif found["power"]:
            exponent = int(found[3])
            if last is None or not exponent:
                raise NotAnExpression("a power of no unit")
            factor, powers, last = (
                _times(factor, powers, last, sign * (exponent - 1)),
                _added(powers, last, sign * (exponent - 1)),
                None,
            )
        elif found["mark"] == "(":
            in_bracket = True
        elif found["mark"] == ")":
            in_bracket, next_sign = False, 1
        elif found["mark"] == "/":
            next_sign = -1
    if max(map(abs, powers)) > 60 or (factor == 1 and not any(powers) and last is None and not re.search(r"[A-Za-z°%]", text)):
        raise NotAnExpression("no unit")
    return Unit(factor, tuple(powers))


def _times(factor: Fraction, powers: list[int], unit: Unit, exponent: int) -> Fraction:
    if abs(exponent) > 12 or max(map(abs, powers)) > 60:
        raise NotAnExpression("a unit to a large power")
    return factor * unit.factor**exponent


def _added(powers: list[int], unit: Unit, exponent: int) -> list[int]:
    return [power + exponent * own for power, own in zip(powers, unit.dimension, strict=True)]


def _named(name: str) -> Unit | None:
    """A unit of the table, an alias, or a prefix before one."""
    name = _ALIASES.get(name, _ALIASES.get(name.lower(), name) if len(name) > 3 else name)
    if name in UNITS:
        return UNITS[name]
    for length in (2, 1):
        power, rest = _PREFIXES.get(name[:length]), name[length:]
        if power is not None and rest in _TAKE_PREFIX:
            unit = UNITS[rest]
            return Unit(unit.factor * Fraction(10) ** power, unit.dimension)
    return None


def read_quantity(text: str) -> Quantity:
    """Read a number with or without a unit.

    Raises:
        NotAnExpression: it is neither.
        TooLarge: it is beyond the limits.
        Undefined: the number has no value.
    """
    text = plain(text.replace("\\$", " dollar "))
    for sign in ("=", "≈"):
        text = text.rpartition(sign)[2].strip()
    for splits, found in enumerate(_NUMBER_ENDS.finditer(text)):
        if splits >= MAX_SPLITS:
            break
        try:
            unit = read_unit(text[found.end() :])
            node, number = _number(text[: found.start()])
        except NotAnExpression:
            continue
        value = number * unit.factor + unit.offset if isinstance(number, Fraction) else _scaled(number, unit)
        return Quantity(value, number, unit.dimension, node)
    node, number = _number(text)
    return Quantity(number, number, None, node)


def has_unit(text: str) -> bool:
    """Whether a text is a number with a unit."""
    try:
        return read_quantity(text).dimension is not None
    except (NotAnExpression, TooLarge, Undefined):
        return False


def _scaled(number: Value, unit: Unit) -> Value:
    scale = type(number)
    return (
        number * scale(unit.factor.numerator) / unit.factor.denominator + scale(unit.offset.numerator) / unit.offset.denominator
    )


def _number(text: str) -> tuple[Node, Value]:
    node = parse(text)
    if node.symbols():
        raise NotAnExpression("a formula with symbols")
    value = evaluate(node)
    if value is None:
        raise Undefined("no value")
    return node, value
