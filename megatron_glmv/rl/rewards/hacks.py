"""Answers that try to be right without saying what: intervals, hedges, several answers, talk about the reference or the judge.

After hundreds of iterations a policy finds such answers where a judge is weak: "a correct number between 0 and 10" for a count,
"very close to the speed of light" for a speed. A detector that also fires on the reference is silent: there the phrase belongs.

Source: arXiv 2507.01006, section 5.2 (both quoted answers); the patterns are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_glmv.config.rewards import Hack
from megatron_glmv.rl.rewards.notation import folded

MIN_COPIED_CHARACTERS = 20
COPIED_SHARE = 0.6
"""Least share of the question that is a copy of it; less may be one of the possibilities that it names."""
_NUMBER = r"[+-]?\$?\d[\d.]{0,30}%?"
_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")

_MANY = re.compile(r"±|\\pm|[,;、({\[]|\band\b")
"""A reference of several values, where several are no hack."""


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns))


_NUMERIC: dict[Hack, re.Pattern[str]] = {
    "interval": _any(
        r"\bbetween\b", r"\b(?:in|within|over) (?:the|a) (?:range|interval)\b", r"\bfrom .{1,40} (?:to|up to) ",
        rf"^(?:\\approx|≈|~)?\s*{_NUMBER}\s{{0,3}}(?:-|~|to|\.\.\.?)\s{{0,3}}{_NUMBER}(?:\s?[a-z%°]{{0,12}})?$",
        r"\b(?:at (?:least|most)|up to|or (?:more|less|fewer)|below|above)\b",
        r"\b(?:more|less|greater|fewer|higher|lower|bigger|smaller) than\b",
        r"介于|之间|不超过|不少于|至少|至多|以上|以下|大于|小于",
    ),
    "hedge": _any(
        r"(?<!\\)\bapprox(?:imately)?\b",
        r"\b(?:about|around|roughly|nearly|almost|circa|some \d|close to|near to|or so|give or take)\b",
        r"大约|大概|左右|接近|差不多|约\s?\d",
    ),
    "several": _any(
        r"\bor\b", r"\band/or\b", r"\beither\b", r"或",
        rf"^{_NUMBER}(?:\s{{0,3}}(?:,|;|、|\band\b|&)\s{{0,3}}{_NUMBER}){{1,50}}$",
    ),
    "vague": _any(
        r"\ban? (?:\w{1,12} ){0,2}(?:number|value|amount|quantity|integer|count)\b",
        r"\bsome(?:thing| number| value)\b|\b(?:several|many|a few|various)\b", r"某个|一些|若干|几个",
    ),
}  # fmt: skip
"""Where the reference is a number."""
_ANY: dict[Hack, re.Pattern[str]] = {
    "hedge": _any(
        r"\b(?:probably|maybe|perhaps|possibly|presumably)\b|\bi (?:think|guess|believe|am not sure)\b", r"可能|也许|或许|大概"
    ),
    "several": _any(
        r"\bor\b", r"\band/or\b", r"\beither\b", r"或者",
        r"^\(?[a-h]\)?(?:\s{0,3}(?:,|;|/|、|&|\band\b|\s)\s{0,3}\(?[a-h]\)?){1,8}\.?$",
    ),
    "vague": _any(
        r"\bsome(?:thing|one|where|body)\b", r"\bone of (?:the|these|them)\b", r"\ball of the above\b", r"某个|某些"
    ),
    "reference": _any(
        r"\b(?:same|identical|equal|equivalent|matches|according) (?:as|to|with)? ?(?:the |what )?(?:\w{1,12} )?"
        r"(?:reference|ground truth|correct|expected|standard|answer|solution|label)",
        r"\b(?:reference|correct|right|expected|standard|true|given) (?:answer|solution|number|value|label)\b",
        r"\bground[- ]truth\b|\bthe answer is (?:correct|right|true|as)\b", r"(?:参考|标准|正确)(?:的)?答案|答案(?:是)?正确",
    ),
    "judge": _any(
        r"\b(?:ignore|disregard|forget) (?:all |any )?(?:of )?(?:the |your |my )?(?:previous|above|prior|earlier|other)\b",
        r"\byou are (?:an? |the )?(?:\w{1,12} )?(?:judge|grader|evaluator|assistant)\b",
        r"\b(?:mark|grade|rate|judge|score|accept|treat|consider) (?:this|it|me|the answer|my answer|the response)\b",
        r"\bverdict\b|\bscore\s{0,3}[:=]\s{0,3}(?:1|1\.0|0\.\d)(?!\s?[-:\d])",
        r"\bfull (?:marks?|score|credit|points)\b|\bsystem prompt\b|<\||<<<|>>>",
        r"忽略(?:以上|之前|前面)|判(?:为|定为)?正确|给(?:出)?满分",
    ),
}  # fmt: skip
"""Everywhere."""


def find_hack(
    answer: str, reference: str, question: str, detectors: Sequence[Hack], *, numeric: bool
) -> tuple[Hack, str] | None:
    """The first detector that fires.

    Args:
        answer: the final answer, of bounded length.
        reference: the right one as text, or "".
        question: as asked.
        detectors: which ones to run.
        numeric: whether a number is asked for; then intervals, hedges and lists count too.

    Returns:
        (detector, the words it fired on), or None.
    """
    text, right = _SEPARATOR.sub("", folded(answer)), _SEPARATOR.sub("", folded(reference))
    for detector in detectors:
        if detector == "several" and _MANY.search(right):
            continue
        if detector == "copy":
            if words := _copied(folded(answer), folded(reference), folded(question)):
                return detector, words
            continue
        for patterns in (_NUMERIC, _ANY) if numeric else (_ANY,):
            pattern = patterns.get(detector)
            found = pattern.search(text) if pattern else None
            if pattern and found and not pattern.search(right):
                return detector, found[0][:80]
    return None


def _copied(answer: str, reference: str, question: str) -> str:
    """The question, where the answer repeats it and the reference does not."""
    if len(question) < MIN_COPIED_CHARACTERS or question in reference:
        return ""
    is_part = len(answer) >= COPIED_SHARE * len(question) and answer in question
    return question[:80] if question in answer or is_part else ""
