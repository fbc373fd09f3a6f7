"""What every response passes before the verifier of its domain: its shape, one language, no repetition.

A bad domain or style lets a policy earn rewards without being right, and one such domain pulls all others down; so these come
first, and what they refuse has a reason code that is counted.

Source: arXiv 2507.01006, section 5.2; the language numbers are those of zai-org/GLM-V 8fc9756, whose repetition check is never
called and whose numbers are not used here.
"""

from __future__ import annotations

import re
from typing import Literal

from megatron_glmv.config.rewards import Gates, LanguageGate, RepetitionGate
from megatron_glmv.rl.rewards.extraction import Refused, Response, extract

_HAN = re.compile(r"[㐀-䶿一-鿿]")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_ENGLISH = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*")
_TOKEN = re.compile(r"[㐀-䶿一-鿿]|[^\W㐀-䶿一-鿿]{1,16}|[^\w\s]")


def pass_gates(text: str, gates: Gates, box: Literal["one", "optional", "none"], reference: str = "") -> Response:
    """Take a response apart and check its style.

    Args:
        text: the response, special tokens kept.
        gates: the settings.
        box: how many box spans its domain wants.
        reference: the text of the right answer, if it is one: where it repeats itself, the answer may too.

    Raises:
        Refused: with the reason and the reward of the gate that refused.
    """
    response = extract(text, gates.format, box)
    parts = {"thinking": response.thought, "answer": response.answer}
    for name, part in parts.items():
        if gates.language.enabled and (fault := mixed_languages(part, gates.language)):
            raise Refused("language", f"{name}: {fault}", gates.language.reward)
    for name, part in parts.items():
        if not gates.repetition.enabled or not (fault := repetition(part, gates.repetition)):
            continue
        if name == "answer" and repetition(reference, gates.repetition):
            continue
        raise Refused("repetition", f"{name}: {fault}", gates.repetition.reward)
    return response


def mixed_languages(text: str, gate: LanguageGate) -> str:
    """What is wrong with a text that has both a long Chinese and a long English paragraph; "" if nothing is."""
    chinese = english = 0
    for number, paragraph in enumerate(text.split("\n"), 1):
        han = len(_HAN.findall(paragraph))
        visible = len(paragraph) - sum(character.isspace() for character in paragraph)
        words = len(_ENGLISH.findall(paragraph))
        all_words = len(_WORD.findall(_HAN.sub(" x ", paragraph)))
        if han >= gate.han_characters and han > gate.han_share * visible:
            chinese = chinese or number
        if words >= gate.english_words and words > gate.english_share * all_words:
            english = english or number
    return f"paragraph {chinese} is Chinese and paragraph {english} English" if chinese and english else ""


def repetition(text: str, gate: RepetitionGate) -> str:
    """What repeats itself in a text; "" if nothing does too much."""
    tokens = _TOKEN.findall(text)
    if len(tokens) < gate.min_tokens:
        return ""
    blocks = len(tokens) - gate.ngram + 1
    if blocks > 0:
        share = 1 - len({tuple(tokens[i : i + gate.ngram]) for i in range(blocks)}) / blocks
        if share > gate.ngram_share:
            return f"{share:.0%} of the blocks of {gate.ngram} tokens occurred before"
    period, length = longest_loop(tokens)
    if length >= gate.loop_tokens and length >= gate.loop_repeats * period:
        return f"a block of {period} tokens stands {length // period} times in a row"
    return ""


def longest_loop(tokens: list[str], window: int = 6) -> tuple[int, int]:
    """The longest stretch that is one block again and again.

    Where a stretch has period p, the last `window` tokens were last seen exactly p tokens ago, token after token.

    Returns:
        (period, length of the stretch) in tokens; (1, 0) if nothing repeats.
    """
    last: dict[tuple[str, ...], int] = {}
    best = (1, 0)
    period = run = 0
    for i in range(len(tokens) - window + 1):
        key = tuple(tokens[i : i + window])
        distance = i - last.get(key, i)
        last[key] = i
        run = run + 1 if distance and distance == period else int(distance > 0)
        period = distance
        length = run + period + window - 1
        if run and length > best[1] and length >= 2 * period:
            best = (period, length)
    return best
