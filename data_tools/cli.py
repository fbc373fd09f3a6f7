"""`glmv-data <tool>`: one command for the offline tools.

The tools are looked up by module name when they are called, so that one tool does not wait for the imports of another
(composing pictures needs no torch), and so that worker processes that import this module again start quickly.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

TOOLS = {
    "digits": ("data_tools.digits", "compose pictures of real handwritten digits with questions and answers"),
    "train-tokenizer": ("data_tools.train_tokenizer", "train a SentencePiece tokenizer with GLM's special tokens"),
    "filter": ("data_tools.filter", "drop samples by resolution, contrast, text and relevance"),
    "dedupe": ("data_tools.dedupe", "drop duplicates and near-duplicates, and what benchmarks contain"),
    "balance": ("data_tools.balance", "resample by concepts so that common ones do not crowd out rare ones"),
    "recaption": ("data_tools.recaption", "have a served model rewrite captions"),
    "render-ocr": ("data_tools.render_ocr", "render text pages over backgrounds, with the boxes of their lines"),
    "grounding": ("data_tools.grounding", "turn boxes into samples in GLM's per-mille convention"),
    "pack": ("data_tools.pack", "tokenise, measure and pack samples into rows of equal length"),
    "inspect": ("data_tools.inspect_rows", "show packed rows as a page, and lint them; or the rollouts of a run"),
    "grade": ("data_tools.grade", "sample and judge answers to prompts: pass rates, tiers, what to drop"),
    "stats": ("data_tools.stats", "draw histograms of packed data sets"),
}
"""Tool name -> (module with add_arguments and run, one line of help)."""

DESCRIPTION = "Offline data tools of megatron-glmv. A data set is made in three steps, each with its own --help:"
EPILOG = """\
example:
  glmv-data digits runs/digits/raw --train 16000 --eval 480
  glmv-data train-tokenizer runs/digits/processor --input runs/digits/raw/train.jsonl --min-pixels 1568
  glmv-data pack runs/digits/raw/train.jsonl runs/digits/train --processor runs/digits/processor --length 1024
  glmv-data inspect runs/digits/train --out runs/digits/rows.html
  glmv-data stats runs/digits/train --out runs/digits/stats
"""


class ToolError(Exception):
    """The input of a tool cannot be used; the message is one line that names the file or sample and what to do."""


def build_parser(tool: str | None = None) -> argparse.ArgumentParser:
    """The command line; only `tool`, where one is named, gets its own arguments."""
    parser = argparse.ArgumentParser(
        prog="glmv-data", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tools = parser.add_subparsers(dest="tool", metavar="TOOL", required=True)
    for name, (module, summary) in TOOLS.items():
        formatter = argparse.RawDescriptionHelpFormatter
        child = tools.add_parser(name, help=summary, formatter_class=formatter)
        if name == tool:
            importlib.import_module(module).add_arguments(child)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one tool.

    Returns:
        Exit code: 0 on success, 1 on input that cannot be used (one line on standard error), 2 on a wrong command line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    named = argv[0] if argv and argv[0] in TOOLS else None
    args = build_parser(named).parse_args(argv)
    try:
        importlib.import_module(TOOLS[args.tool][0]).run(args)
    except (ToolError, ValueError, OSError) as error:
        print(f"glmv-data {args.tool}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"glmv-data {args.tool}: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    return 0
