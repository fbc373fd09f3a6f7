"""A page of rollouts: one HTML file that needs no server, no network and no other file.

What a model wrote stands in it as text; besides, the page's policy lets no script run but its own, and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from data_tools.rollouts import RolloutFiles, SampledAnswer, SampledGroup, Totals
from data_tools.untrusted_text import in_attribute, show_answer, show_text

FOLDER = Path(__file__).parent
MAX_ANSWERS = 64
"""Answers shown of a group; equal ones are shown once, with their number."""
MAX_MEDIA = 16
"""Pictures and videos shown of a prompt."""
MAX_DOMAINS = 100
SPARK = (150, 26)
"""Width and height of the line of a domain's rewards."""
_KINDS = {"": "all", "useful": "with a gradient", "degenerate": "without", "unjudged": "not judged"}
_ORDERS = {"number": "as sampled", "-step": "newest first", "reward": "lowest reward", "-reward": "highest reward",
           "middle": "closest to half", "-tokens": "longest"}  # fmt: skip
_ANY_NUMBER = 'type="number" step="any" placeholder="any"'
Draw = Callable[[str], list[tuple[str, str]]]
"""Path of a medium -> (caption, data: URI), as `thumbnails.draw_file`."""


class RolloutPage:
    """Writes the page piece by piece.

    Args:
        title: of the page.
        files: counted groups.
        shown: how many groups will be added.
        draw: small pictures of a medium.
    """

    def __init__(self, title: str, files: RolloutFiles, shown: int, draw: Draw) -> None:
        self._title, self._files, self._shown, self._draw = title, files, shown, draw
        self._domains = {name: place for place, name in enumerate(sorted(files.totals))}
        self.missing_media = 0

    def head(self) -> str:
        """Everything up to the first group."""
        css = "".join((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "rollout_page.css"))
        policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_digest(_script())}'"
        total, steps = self._files.overall, self._files.steps
        facts = [("iterations", f"{len(steps):,}"), ("groups", f"{total.groups:,}"), ("answers", f"{total.answers:,}"),
                 ("mean reward", _ratio(total.reward, total.judged, "{:.3f}")), ("accuracy", _share(total.right, total.judged)),
                 ("groups without gradient", _share(total.degenerate, total.judged_groups)),
                 ("answers forced", _share(total.forced, total.answers)),
                 ("tokens an answer", _ratio(total.tokens, total.answers, "{:,.0f}"))]  # fmt: skip
        listed = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in facts)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{in_attribute(self._title)}</title><style>{css}</style></head><body><main>"
            f'<h1>{show_text(self._title)}</h1><div class="soft">rollouts: what was sampled, and what it was worth</div>'
            f'<div class="facts">{listed}</div>{self._table()}{self._bad_lines()}{self._bar()}<div id="groups">'
        )

    def group(self, number: int, group: SampledGroup) -> str:
        """One group; `number` counts from 0 over the files."""
        rewards = group.rewards
        mean = sum(rewards) / len(rewards) if rewards else None
        rate = group.num_right / len(rewards) if rewards else None
        badges = [group.tier.replace("_", " "), "trained on" if group.chosen else "not trained on"]
        kinds = {"useful": "", "degenerate": "no gradient", "unjudged": "not judged"}
        marks = "".join(f'<span class="tag">{show_text(name, 80)}</span>' for name in badges if name)
        marks += f'<span class="badge">{kinds[group.kind]}</span>' if kinds[group.kind] else ""
        where = show_text(group.domain + (f" / {group.subcategory}" if group.subcategory else ""), 120)
        figures = (
            f'<div class="score">{_meter(rate)}<span><b>{group.num_right}</b> of {len(rewards)} right</span>'
            f"<span>mean reward <b>{'–' if mean is None else _number(mean)}</b></span></div>"
        )
        counts = Counter(group.answers)
        answers = "".join(_answer(answer, counts[answer]) for answer in list(counts)[:MAX_ANSWERS])
        if len(counts) > MAX_ANSWERS:
            answers += f'<p class="soft">and {len(counts) - MAX_ANSWERS:,} other answers</p>'
        tokens = sum(answer.tokens for answer in group.answers) / max(1, len(group.answers))
        data = {"step": group.step, "domain": self._domains[group.domain], "kind": group.kind, "chosen": int(group.chosen),
                "reward": "" if mean is None else f"{mean:.6g}", "tokens": f"{tokens:.1f}", "number": number}  # fmt: skip
        attributes = "".join(f' data-{name}="{value}"' for name, value in data.items())
        return (
            f'<section class="row group" id="group-{number}"{attributes}><header><h2>{where} <small>iteration {group.step} · '
            f"{show_text(group.key, 200)}</small>{marks}</h2>{figures}</header>"
            f'<div class="sides"><div class="asked">{self._media(group.media)}{_field("question", group.question)}'
            f'{_field("reference", _as_text(group.answer))}</div><div class="answers">{answers}</div></div></section>\n'
        )

    def tail(self) -> str:
        """Everything behind the last group."""
        return (
            '</div><p id="none" class="soft" hidden>No group is left; loosen a filter.</p>'
            f"<footer>glmv-data inspect</footer></main><script>{_script()}</script></body></html>\n"
        )

    def _table(self) -> str:
        head = ("domain", "groups", "trained on", "reward", "accuracy", "no gradient", "forced", "cut", "masked", "tokens",
                "reward over the iterations", "reasons")  # fmt: skip
        rows = sorted(self._files.totals.items(), key=lambda item: (-item[1].groups, item[0]))
        body = "".join(_domain_row(name, total, self._files.steps) for name, total in rows[:MAX_DOMAINS])
        more = f'<p class="soft">and {len(rows) - MAX_DOMAINS:,} more domains</p>' if len(rows) > MAX_DOMAINS else ""
        titles = "".join(f"<th>{name}</th>" for name in head)
        return f'<div class="panel wide"><table class="domains"><tr>{titles}</tr>{body}</table>{more}</div>'

    def _bad_lines(self) -> str:
        if not self._files.bad:
            return ""
        listed = "".join(f"<div>{show_text(reason, 400)}</div>" for reason in self._files.named)
        more = self._files.bad - len(self._files.named)
        listed += f"<div>and {more:,} more</div>" if more else ""
        return f'<div class="panel"><h2>{self._files.bad:,} lines hold no group</h2>{listed}</div>'

    def _bar(self) -> str:
        """Filters and order of what is shown."""
        domains = "".join(f'<option value="{place}">{in_attribute(name, 60)}</option>' for name, place in self._domains.items())
        first, last = min(self._files.steps), max(self._files.steps)
        total = len(self._files)
        note = f"{self._shown:,} groups" if total == self._shown else f"{self._shown:,} of {total:,} groups are on this page"
        fields = [
            f'domain <select name="domain"><option value="">all</option>{domains}</select>',
            _select("groups", "kind", _KINDS),
            _select("trained on", "chosen", {"": "all", "1": "yes", "0": "no"}),
            f'iteration <input name="first" type="number" value="{first}"> to <input name="last" type="number" value="{last}">',
            f'reward <input name="low" {_ANY_NUMBER}> to <input name="high" {_ANY_NUMBER}>',
            'text <input name="text" type="search" placeholder="in prompt or answers">',
            _select("order", "order", _ORDERS),
        ]
        labels = "".join(f"<label>{field}</label>" for field in fields)
        return f'<form id="bar" class="panel" autocomplete="off">{labels}<span id="count" class="soft">{note}</span></form>'

    def _media(self, media: Sequence[str]) -> str:
        figures = []
        for path in media[:MAX_MEDIA]:
            thumbnails = self._draw(path)
            self.missing_media += thumbnails[0] == ("missing", "")
            pictures = "".join(
                f'<img src="{uri}" alt="" loading="lazy" title="{in_attribute(caption)}">'
                if uri
                else f'<div class="gone">{show_text(caption, 120)}</div>'
                for caption, uri in thumbnails
            )
            caption = thumbnails[0][0] if len(thumbnails) == 1 and thumbnails[0][1] else ""
            name = show_text(path, 300) + (f" · {caption}" if caption else "")
            figures.append(f"<figure><div>{pictures}</div><figcaption>{name}</figcaption></figure>")
        more = f'<p class="soft">and {len(media) - MAX_MEDIA} more</p>' if len(media) > MAX_MEDIA else ""
        return f'<div class="media">{"".join(figures)}{more}</div>' if figures else ""


def _select(label: str, name: str, options: Mapping[str, str]) -> str:
    listed = "".join(f'<option value="{value}">{words}</option>' for value, words in options.items())
    return f'{label} <select name="{name}">{listed}</select>'


def _answer(answer: SampledAnswer, count: int) -> str:
    state = "masked" if answer.reward is None else ("right" if answer.correct else "wrong")
    if state == "wrong" and answer.reward is not None and answer.reward > 0:
        state = "partial"
    mark = {"masked": "?", "right": "✓", "wrong": "✗", "partial": "≈"}[state]
    facts = [f"{count} times" if count > 1 else "", answer.reason, f"{answer.tokens:,} tokens"]
    if answer.inserted:
        facts.append(f"forced: {answer.inserted / max(1, answer.tokens):.0%} inserted")
    if answer.finish != "stop":
        facts.append({"length": "cut at the limit", "abort": "given up"}.get(answer.finish, answer.finish))
    advantage = "" if answer.advantage is None else f"{answer.advantage:+.2f}"
    sign = "" if not answer.advantage else (" up" if answer.advantage > 0 else " down")
    detail = f'<div class="detail">{show_text(answer.detail, 600)}</div>' if answer.detail else ""
    return (
        f'<div class="answer {state}"><div class="worth"><b>{mark} {_number(answer.reward)}</b>'
        f'<span class="advantage{sign}" title="advantage">{advantage}</span></div>'
        f'<div class="text">{show_answer(answer.text)}</div>'
        f'<div class="about">{show_text(" · ".join(fact for fact in facts if fact), 300)}{detail}</div></div>'
    )


def _domain_row(name: str, total: Totals, steps: Iterable[int]) -> str:
    masked = total.answers - total.judged
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in total.reasons.most_common(6))
    more = f", {len(total.reasons) - 6} more" if len(total.reasons) > 6 else ""
    cells = [f"{total.groups:,}", f"{total.trained:,}", _ratio(total.reward, total.judged, "{:.3f}"),
             _share(total.right, total.judged), _share(total.degenerate, total.judged_groups),
             _share(total.forced, total.answers), _share(total.cut, total.answers), _share(masked, total.answers),
             _ratio(total.tokens, total.answers, "{:,.0f}")]  # fmt: skip
    numbers = "".join(f"<td>{cell}</td>" for cell in cells)
    return (
        f"<tr><td><b>{show_text(name, 80)}</b></td>{numbers}<td>{_spark(total, steps)}</td>"
        f"<td>{show_text(reasons, 300)}{more}</td></tr>"
    )


def _spark(total: Totals, steps: Iterable[int]) -> str:
    """A line of the mean rewards by iteration, from 0 or the smallest to 1 or the largest."""
    points = [
        (step, total.by_step[step][0] / total.by_step[step][1]) for step in sorted(total.by_step) if total.by_step[step][1]
    ]
    listed = sorted(steps)
    if len(points) < 2:
        return ""
    width, height = SPARK
    low, high = min(0.0, *(value for _, value in points)), max(1.0, *(value for _, value in points))
    span = max(1, listed[-1] - listed[0])
    line = "L".join(
        f"{(step - listed[0]) / span * width:.1f} {height - (value - low) / (high - low) * height:.1f}"
        for step, value in points
    )
    words = f"{points[0][1]:.3f} at iteration {points[0][0]}, {points[-1][1]:.3f} at iteration {points[-1][0]}"
    return (f'<svg class="spark" viewBox="-2 -2 {width + 4} {height + 4}" role="img"><title>{words}</title>'
            f'<path class="ground" d="M0 {height}H{width}M0 0H{width}"/><path class="line" d="M{line}"/></svg>')  # fmt: skip


def _field(name: str, text: str) -> str:
    return f'<div class="field"><span>{name}</span><div class="text">{show_text(text) if text else "—"}</div></div>'


def _as_text(answer: object) -> str:
    if answer is None:
        return ""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def _meter(rate: float | None) -> str:
    return "" if rate is None else f'<div class="bar"><i class="full" style="width:{rate:.1%}"></i></div>'


def _number(value: float | None) -> str:
    return "masked" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")


def _ratio(part: float, whole: int, form: str) -> str:
    return form.format(part / whole) if whole else "–"


def _share(part: int, whole: int) -> str:
    return _ratio(100 * part, whole, "{:.1f} %")


def _script() -> str:
    return (FOLDER / "rollout_page.js").read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
