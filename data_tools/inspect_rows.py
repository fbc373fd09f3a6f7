"""`glmv-data inspect`: packed rows as a page to look at, and a lint of what training would learn wrongly from them.

Rollouts of reinforcement learning go to `inspect_rollouts`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from data_tools.inspect_rollouts import DEFAULT_GROUPS, inspect_rollouts
from data_tools.lint import Answers, Finding, Linter
from data_tools.number_list import read_numbers
from data_tools.rollouts import find_rollouts
from data_tools.row_page import RowPage
from megatron_glmv.config.base import InputError
from megatron_glmv.data.chat import Chat
from megatron_glmv.data.index import ShardError
from megatron_glmv.data.shard_reader import ShardReader

DEFAULT_ROWS = 12
MAX_ADDED = 20
"""Rows with findings that are shown although nobody asked for them."""

HELP = """\
Writes one HTML file that needs nothing else: the chosen rows with their pictures and video frames, tokens coloured by loss
weight (hover one for its id, text, weight and positions), document boundaries, the three position axes and both budgets.

Rows are also linted: media without a placeholder, wrong counts, no stop token trained, everything masked, broken think, answer
and box tags. Findings are listed with links; the first rows that have some are added to the page.

Of a run of `glmv rl` it shows the rollouts instead: every group's prompt with pictures, its answers with reward, reason and
advantage (thinking folded), a summary by domain, and filters. Only the groups on the page are kept in memory.

  glmv-data inspect runs/sft/rows --rows 3,10-19 --out rows.html
  glmv-data inspect runs/rl --iterations 90-100 --domain math --count 200 --out rollouts.html
  glmv-data inspect runs/rl/rollouts/step_00000100.jsonl"""


class LintError(InputError):
    """With --strict: rows have findings."""


def choose_rows(text: str | None, count: int, default: int = DEFAULT_ROWS) -> list[int]:
    """Row numbers from `3,10-19`; evenly spaced ones over the data set without a text.

    Raises:
        ValueError: not of this form, or a row that the data set does not have.
    """
    if text is None:
        return sorted(set(np.linspace(0, count - 1, min(default, count)).astype(int).tolist()))
    return read_numbers("--rows", text, count)


def lint_rows(reader: ShardReader, linter: Linter, rows: Sequence[int]) -> list[Finding]:
    """The findings of some rows; media are not read."""
    findings: list[Finding] = []
    for number in rows:
        try:
            findings += linter.check(number, reader.read(number, media=False))
        except ShardError as error:
            findings.append(Finding(number, -1, f"row {number}", "row_unreadable", str(error)))
    return findings


def inspect_rows(
    folder: Path,
    out: Path,
    *,
    rows: str | None = None,
    processor: Path | None = None,
    num_linted: int = 1000,
    answers: Answers = "tagged",
) -> dict[str, Any]:
    """Write the page.

    Args:
        folder: a packed data set.
        out: HTML file.
        rows: which rows to show, as `choose_rows` reads them.
        processor: its folder; without one the copy in the data set, and ids instead of texts where there is none.
        num_linted: rows to lint, evenly spaced; 0 for all.
        answers: as `Linter` takes it.

    Returns:
        The report: rows shown and linted, findings by code.

    Raises:
        ShardError: no data set that can be read.
        ProcessorError: a processor folder that cannot be used.
        ValueError: rows that are not there.
    """
    started = time.monotonic()
    reader = ShardReader(folder)
    own = folder / "processor"
    chat = Chat(processor) if processor else (Chat(own) if own.is_dir() else None)
    chosen = choose_rows(rows, len(reader))
    linted = choose_rows(None, len(reader), num_linted or len(reader))
    linter = Linter(reader.index, chat, answers)
    findings = lint_rows(reader, linter, sorted({*chosen, *linted}))
    readable = {finding.row for finding in findings if finding.code == "row_unreadable"}
    added = [row for row in dict.fromkeys(finding.row for finding in findings) if row not in chosen][:MAX_ADDED]
    patches = _largest_patches(reader)
    budget = _read_report(folder).get("settings", {}).get("max_patches")
    page = RowPage(folder.name, reader.index, chat, budget or patches, budget is not None)
    for number in [*chosen, *added]:
        if number not in readable:
            page.add(number, reader.read(number), [finding for finding in findings if finding.row == number])
    checked = len({*chosen, *linted})
    words = f"all {checked:,} rows" if checked == len(reader) else f"{checked:,} of {len(reader):,} rows"
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(page.html(_facts(reader, patches), findings, words), encoding="utf-8")
    partial.rename(out)
    return {"tool": "inspect", "out": str(out), "size_bytes": out.stat().st_size, "shown": [*chosen, *added], "linted": checked,
            "rows": len(reader), "findings": dict(Counter(finding.code for finding in findings)),
            "seconds": round(time.monotonic() - started, 1)}  # fmt: skip


def _facts(reader: ShardReader, patches: int) -> list[tuple[str, str]]:
    index = reader.index
    fill = index.num_tokens / (index.num_rows * index.length)
    return [("rows", f"{index.num_rows:,}"), ("samples", f"{index.num_samples:,}"), ("tokens", f"{index.num_tokens:,}"),
            ("tokens of a row", f"{index.length:,}"), ("fill", f"{fill:.2%}"), ("most patches in a row", f"{patches:,}"),
            ("documents rounded to", f"{index.align}")]  # fmt: skip


def _largest_patches(reader: ShardReader) -> int:
    return int(max(table["patches"].max() for table in reader.tables()))


def _read_report(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glmv-data inspect`."""
    parser.description = HELP
    parser.add_argument("dataset", type=Path, metavar="DATASET | RUN",
                        help="folder of `glmv-data pack`; or run folder of `glmv rl`, or a file of its rollouts")  # fmt: skip
    parser.add_argument(
        "--rows", metavar="3,10-19",
        help=f"which rows or groups to show (default: {DEFAULT_ROWS} or {DEFAULT_GROUPS}, evenly spaced)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="PAGE", help="default rows.html or rollouts.html")
    parser.add_argument("--processor", type=Path, metavar="FOLDER", help="default: the copy in the data set")
    parser.add_argument(
        "--lint-rows", type=int, default=1000, metavar="N", help="rows to lint, 0 for all (default %(default)s)"
    )
    parser.add_argument("--answers", choices=get_args(Answers), default="tagged",
                        help="check the form of answers that hold a think, answer or box tag, of all, or of none")  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="exit code 1 when the lint finds something, or a line is bad")
    group = parser.add_argument_group("rollouts")
    group.add_argument("--count", type=int, default=DEFAULT_GROUPS, metavar="N", help="groups to show (default %(default)s)")
    group.add_argument("--iterations", metavar="3,10-19", help="to read (default: all)")
    group.add_argument("--domain", metavar="NAME", help="to read (default: all)")
    group.add_argument("--media-root", type=Path, metavar="FOLDER",
                       help="where relative paths of pictures start (default: here, where the run was started)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Run the tool and print its report."""
    files = find_rollouts(args.dataset)
    if files or args.dataset.is_file():
        _run_rollouts(args, files)
        return
    report = inspect_rows(args.dataset, args.out or Path("rows.html"), rows=args.rows, processor=args.processor,
                          num_linted=args.lint_rows, answers=args.answers)  # fmt: skip
    print(json.dumps(report))
    if args.strict and report["findings"]:
        found = ", ".join(f"{count} {code}" for code, count in report["findings"].items())
        raise LintError(f"{args.dataset}: {found}; they are listed in {report['out']}")


def _run_rollouts(args: argparse.Namespace, files: Sequence[Path]) -> None:
    if not files:
        raise ValueError(f"{args.dataset}: neither a folder of `glmv-data pack` nor a .jsonl file of rollouts")
    if args.count < 1:
        raise ValueError("--count: at least 1")
    report = inspect_rollouts(
        files, args.out or Path("rollouts.html"), title=args.dataset.resolve().name, rows=args.rows, count=args.count,
        iterations=args.iterations, domain=args.domain, media_root=args.media_root,
    )  # fmt: skip
    print(json.dumps(report))
    if args.strict and report["bad_lines"]:
        raise LintError(f"{args.dataset}: {report['bad_lines']} lines hold no group; they are named in {report['out']}")
