"""The arguments that every tool over a corpus takes, and how a tool is started with them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from data_tools.corpus.checks import Check
from data_tools.corpus.job import Job, Part
from data_tools.corpus.pipeline import Settings, Source, Tool, run_tool
from data_tools.corpus.reader import CHUNK, CorpusError, list_chunks, list_files
from data_tools.corpus.writer import FORMS

HELP = """\

INPUT is .jsonl files with media beside them, WebDataset .tar files, Hugging Face .parquet files, or folders of these. A sample
is a chat (messages with items of type text, image, video), LLaVA's conversations, OpenAI's messages with image_url, or a
picture with a caption. OUT gets the samples (--form), report.json, and dropped.jsonl with source, key and reason of every
sample that was left out; it is OUT.partial until it is complete. The same command continues after a kill."""


def add_arguments(parser: argparse.ArgumentParser, with_inputs: bool = True) -> None:
    """Add the arguments of reading, writing and dividing."""
    group = parser.add_argument_group("corpus")
    if with_inputs:
        parser.add_argument("paths", type=Path, nargs="+", metavar="INPUT ... OUT", help="corpus files or folders, then OUT")
        group.add_argument("--media-root", type=Path, action="append", default=[], metavar="FOLDER",
                           help="samples may also name files under this folder")  # fmt: skip
    else:
        parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    group.add_argument("--form", choices=FORMS, default="jsonl", help="of the output (default %(default)s)")
    group.add_argument("--part", type=Part.parse, default=Part(), metavar="i/n", help="do this share of the chunks")
    group.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="wait for the other parts where all are needed"
    )
    group.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: as many as cores)")
    group.add_argument("--chunk", type=int, default=CHUNK, metavar="N",
                       help="samples of a unit of work and of an output shard; a tar is one (default %(default)s)")  # fmt: skip
    group.add_argument("--shard-mib", type=int, default=1024, metavar="N", help="size that closes a shard (default 1024)")
    group.add_argument("--check", choices=get_args(Check)[:2], default="decode",
                       help="decode every picture to its end, or read headers only (default %(default)s)")  # fmt: skip
    group.add_argument("--max-bad-share", type=float, default=0.05, metavar="SHARE",
                       help="stop when more of the samples have faults (default %(default)s)")  # fmt: skip


def read_settings(args: argparse.Namespace) -> Settings:
    """What reading and writing depend on.

    Raises:
        CorpusError: a number out of its range.
    """
    if args.chunk < 1 or args.shard_mib < 1 or args.workers < 0 or not 0 <= args.max_bad_share <= 1 or args.wait < 0:
        raise CorpusError("--chunk and --shard-mib at least 1, --workers and --wait at least 0, --max-bad-share from 0 to 1")
    return Settings(args.form, args.check, args.shard_mib << 20)


def run_over_corpus(args: argparse.Namespace, tool: Tool) -> dict[str, Any]:
    """Run a tool over the corpus that its arguments name, and print the report."""
    settings = read_settings(args)
    *inputs, out = args.paths
    if not inputs:
        raise CorpusError("name at least one INPUT and the folder OUT")
    files = {label: [path.stat().st_size, path.stat().st_mtime_ns] for label, path in list_files(inputs).items()}
    chunks = list_chunks(inputs, args.chunk, args.media_root)
    return run_chunks(args, tool, settings, chunks, out, {"inputs": files, "chunk": args.chunk})


def run_chunks(
    args: argparse.Namespace, tool: Tool, settings: Settings, chunks: Sequence[Source], out: Path, described: dict[str, Any]
) -> dict[str, Any]:
    """Run a tool over chunks, and print the report.

    Args:
        args: of the command line, for the part, workers and limits.
        tool: to run.
        settings: of reading and writing.
        chunks: of the whole job.
        out: folder.
        described: what the chunks depend on, as JSON.
    """
    everything = described | vars(settings) | tool.settings()
    job = Job(tool.name, out, everything, part=args.part, num_workers=args.workers, max_bad_share=args.max_bad_share,
              wait_s=args.wait)  # fmt: skip
    report = run_tool(tool, job, chunks, settings)
    print(json.dumps({name: value for name, value in report.items() if name != "settings"}))
    return report
