"""`glmv-data inspect` of a run of reinforcement learning: its rollouts as a page to look at."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.number_list import read_numbers
from data_tools.rollout_page import RolloutPage
from data_tools.rollouts import RolloutFiles
from data_tools.thumbnails import draw_file

DEFAULT_GROUPS = 80
"""Groups shown; evenly spaced over all of them."""


def inspect_rollouts(
    files: Sequence[Path],
    out: Path,
    *,
    title: str,
    rows: str | None = None,
    count: int = DEFAULT_GROUPS,
    iterations: str | None = None,
    domain: str | None = None,
    media_root: Path | None = None,
) -> dict[str, Any]:
    """Write the page; only the groups that it shows are in memory, one at a time.

    Args:
        files: of rollouts.
        out: HTML file.
        title: of the page.
        rows: numbers of the groups to show, as `3,10-19`, counted from 0 over those of `iterations` and `domain`.
        count: without `rows`, how many to show, evenly spaced.
        iterations: to read, as `3,10-19`; None: all.
        domain: to read; None: all.
        media_root: folder that relative paths of media start from; None: the current one.

    Returns:
        The report: what was counted and shown.

    Raises:
        ValueError: no group, or numbers that are not there.
    """
    started = time.monotonic()
    steps = frozenset(read_numbers("--iterations", iterations)) if iterations else frozenset()
    groups = RolloutFiles(files, steps, domain)
    if rows is None:
        chosen = sorted(set(np.linspace(0, len(groups) - 1, min(count, len(groups))).astype(int).tolist()))
    else:
        chosen = read_numbers("--rows", rows, len(groups), "groups")
    page = RolloutPage(title, groups, len(chosen), lambda path: _draw(path, media_root))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    with partial.open("w", encoding="utf-8") as sink:
        sink.write(page.head())
        for number in chosen:
            sink.write(page.group(number, groups.read(number)))
        sink.write(page.tail())
    partial.replace(out)
    return {"tool": "inspect", "out": str(out), "size_bytes": out.stat().st_size, "iterations": len(groups.steps),
            "groups": len(groups), "answers": groups.overall.answers, "shown": len(chosen), "bad_lines": groups.bad,
            "missing_media": page.missing_media, "seconds": round(time.monotonic() - started, 1)}  # fmt: skip


def _draw(path: str, root: Path | None) -> list[tuple[str, str]]:
    if "://" in path:
        return [("not a file: pages load nothing", "")]
    if "\0" in path:
        return [("missing", "")]
    return draw_file((root or Path()) / path)
