"""One plain spelling for the many ways to write a number or a formula: LaTeX, Unicode, words.

Only replaces text by text, with patterns that cannot backtrack far; what the result means is `expression`'s matter. The length
of the text is limited before any pattern sees it.
"""

from __future__ import annotations

import re
import unicodedata

MAX_CHARACTERS = 2_000
"""Longest text that is read as a formula."""


class TooLarge(ValueError):
    """A formula is longer, deeper or larger than what is looked at."""


_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPT = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_RAISED = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_VULGAR = re.compile(r"(\d?)([¼½¾⅐-⅞])")
_THOUSANDS = re.compile(r"(?<![\d.,(\[{])(\d{1,3})((?:,\d{3}){1,30})(?![\d,])")
_THIN_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\,|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_MIXED = re.compile(r"(?<![\d.^_/*)}])(\d{1,9})\s+(\d{1,9})/(\d{1,9})(?![\d.])")
_TEXT = re.compile(
    r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mathit|mathsf|rm|bf|operatorname|mbox|unit|hbox|boldsymbol)\*?\s*\{([^{}]*)\}"
)
_SIZES = re.compile(r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|displaystyle|textstyle|limits|rm|bf)(?![A-Za-z])\s*\.?")
_SPACES = re.compile(r"\\(?:[,;:!> ]|q?quad(?![A-Za-z])|hspace\{[^{}]*\})|~")
_COMMANDS = {
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=",
    "geqslant": ">=", "lt": "<", "gt": ">", "ne": "!=", "neq": "!=", "approx": "≈", "dfrac": "\\frac", "tfrac": "\\frac",
    "cfrac": "\\frac", "lbrace": "\\{", "rbrace": "\\}", "degree": "°", "circ": "°", "mu": "μ", "Omega": "Ω", "pm": "±",
    "to": "->", "rightarrow": "->", "longrightarrow": "->", "infin": "\\infty", "varnothing": "∅", "emptyset": "∅",
    "cup": "∪", "in": "∈",
    "colon": ":", "mid": "|", "vert": "|", "lvert": "|", "rvert": "|", "lfloor": "⌊", "rfloor": "⌋", "vartheta": "\\theta",
    "varphi": "\\phi", "ldots": "...", "dots": "...", "cdots": "...", "lor": " or ", "land": " and ", "implies": "=>",
}  # fmt: skip
_COMMAND = re.compile(r"\\([A-Za-z]{1,20})(?![A-Za-z])")
_WORD = re.compile(r"(?<![\d/*\\])(?<![\d/*\\] )\b(?:[A-Z][a-z]{3,}|Yes|No|Odd)\b")
"""A word with a capital, but no unit behind a number and no command: Mcal is not mcal, \\Delta not \\delta."""
_AROUND_MARKS = re.compile(r"\s*([^\w\s\\.])\s*")
_END_MARKS = " .,;:!?\"'`*。、！？"
_POINT_FIRST = re.compile(r"\.\d")
_CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "—": "-", "‐": "-", "﹣": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "∕": "/", "⁄": "/",
    "≤": "<=", "≥": ">=", "≠": "!=", "≅": "≈", "≃": "≈", "π": "\\pi ", "√": " sqrt ", "∞": "\\infty ", "µ": "μ", "Ω": "Ω",
    "º": "°", "˚": "°", "′": "'", "’": "'", "“": '"', "”": '"', "，": ",", "。": ".", "；": ";", "：": ":", "（": "(",
    "）": ")",
    "→": "->",
    "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "λ": "\\lambda ", "φ": "\\phi ", "ω": "\\omega ",
})  # fmt: skip
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: n for n, word in enumerate(_UNITS.split())} | {word: 10 * n for n, word in enumerate(_TENS.split(), 2)}
_HAN_DIGITS = {character: n for n, character in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}


def limited(text: str, characters: int = MAX_CHARACTERS) -> str:
    """The text, if it is short enough.

    Raises:
        TooLarge: it is not.
    """
    if len(text) > characters:
        raise TooLarge(f"{len(text)} characters, more than {characters}")
    return text


def plain(text: str) -> str:
    r"""A formula in the plain spelling that `expression` reads: ASCII operators, \frac, \sqrt, no sizes, spaces or dollars.

    Raises:
        TooLarge: the text is longer than `MAX_CHARACTERS`.
    """
    text = limited(text).strip()
    text = _RAISED.sub(lambda found: "^{" + found[0].translate(_SUPERSCRIPT) + "}", text.translate(_SUBSCRIPT))
    text = _VULGAR.sub(_vulgar, text)
    text = _THIN_THOUSANDS.sub("", text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
    for mark in ("$", "\\(", "\\)", "\\[", "\\]"):
        text = text.replace(mark, " ")
    text = text.replace("\\$", " ").replace("\\%", "%").replace("\\|", "|")
    text = _TEXT.sub(r" \1 ", text)
    text = _COMMAND.sub(lambda found: _COMMANDS.get(found[1], found[0]), _SPACES.sub(" ", _SIZES.sub(" ", text)))
    text = text.replace("^{°}", "°").replace("^°", "°").replace("^ °", "°")
    text = _MIXED.sub(r"(\1+\2/\3)", _THOUSANDS.sub(lambda found: found[1] + found[2].replace(",", ""), text))
    return " ".join(text.split()).rstrip(".。;, ").strip()


def spelled(text: str) -> str:
    """A formula for exact comparison: `plain`, no spaces around marks; case counts but in words: M is not m, Even is even.

    Raises:
        TooLarge: the text is longer than `MAX_CHARACTERS`.
    """
    return _AROUND_MARKS.sub(r"\1", _WORD.sub(lambda found: found[0].lower(), plain(text).strip('"` ')))


def folded(text: str, *, cased: bool = False) -> str:
    """A short text for exact comparison: width, spaces, quotes, articles, marks at the ends and, unless `cased`, case go."""
    text = unicodedata.normalize("NFKC", _RAISED.sub(r"^\g<0>", text).translate(_CHARACTERS))
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text if cased else text.casefold())
    words = text.replace("$", " ").split()
    while len(words) > 1 and words[0].lower() in (("a", "an", "the") if len(words[1]) > 1 else ("the",)):
        del words[0]
    text = " ".join(words).rstrip(_END_MARKS)
    return text if _POINT_FIRST.match(text) else text.lstrip(_END_MARKS)


def number_word(text: str) -> int | None:
    """The value of a number written out in English or Chinese, 0 to 999; None if it is not one."""
    words = text.casefold().replace("-", " ").split()
    if len(words) == 1 and words[0] and all(character in _HAN_DIGITS or character in "十百" for character in words[0]):
        return _han_number(words[0])
    total, last = 0, 1_000
    for word in (word for word in words if word != "and"):
        if word == "hundred" and 0 < total < 10:
            total, last = total * 100, 100
            continue
        value = _WORDS.get(word)
        # Each word names a smaller place than the one before: "twenty one", not "one twenty" or "one two".
        if value is None or value >= last or (last < 100 and (last < 20 or value == 0)):
            return None
        total, last = total + value, value if value >= 20 else 1
    return total if words and last < 1_000 else None


def _vulgar(found: re.Match[str]) -> str:
    fraction = "(" + unicodedata.normalize("NFKC", found[2]).replace("⁄", "/") + ")"
    return f"{found[1]}+{fraction}" if found[1] else fraction


def _han_number(text: str) -> int | None:
    if len(text) > 5:
        return None
    total, digit = 0, 0
    for character in text:
        if character in "十百":
            total += (digit or 1) * (10 if character == "十" else 100)
            digit = 0
        elif digit:
            return None
        else:
            digit = _HAN_DIGITS[character]
    return total + digit
