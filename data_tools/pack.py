"""`glmv-data pack`: samples to rows of equal length and even cost, offline, so that training only reads and decodes.

Packing before training makes the global order of rows a pure function of a few integers, and finds every unusable sample
before a cluster waits for it.

With `--part i/n` each of n runs, on as many machines, measures its share of the corpus and packs it into shards of its own; the
last to finish joins the indexes. So writing, the slowest step by far, is divided too, and rows are as full as with one run,
because a share of any size fills them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.corpus.job import REPORT, SETTINGS, Job, Part, chunk_path, write_json
from data_tools.corpus.reader import list_chunks, list_files
from data_tools.measure import Measuring
from data_tools.pack_rows import RowPacking, RowSettings, Share
from megatron_glmv.data.chat import Thinking
from megatron_glmv.data.index import COLUMNS, PackedIndex, ShardError, join_indexes, write_index

MEASURED, ROWS = "measured", "rows"
PEERS = 8
"""Replicas for which the report says how long they wait for the costliest row."""

HELP = """\
Reads samples, measures them (tokens from the processor's tokenizer and chat template, sizes of pictures and frames of videos
from their headers), packs them into rows of --length tokens that cost alike, and writes OUT:
  index.json               what the rows were packed for; written last
  shard-00000.tar          rows: tokens, loss weights and the untouched bytes of their media (a WebDataset tar)
  shard-00000.rows.npy     where each row is
  processor/               a copy of the processor folder
  report.json              samples, rows, fill, tokens, patches, cost, dropped samples by reason; also printed
  dropped.jsonl            the dropped samples with source, key and reason, where there are any

INPUT: .jsonl files with media beside them, WebDataset tars, Parquet files, or folders of these. A sample is
{"id": ..., "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "..."}]},
{"role": "assistant", "content": "..."}]}, or has LLaVA's or OpenAI's form. Paths are relative to the file's folder.
The assistant's turns and the tokens that end them are trained; think blocks of earlier turns are taken out, and what lost
its own is not trained. EXIF orientation is applied.

A sample that cannot be used is dropped; too many of them stop the tool (--max-bad-share). A sample that exceeds a row stops
it before anything is written, unless --skip-long. The work lies in OUT.partial, which becomes OUT at the end: a run that was
interrupted or killed goes on behind what is complete and writes the same bytes, and a run with the same arguments as a
complete OUT only prints its report."""


@dataclass(frozen=True)
class Plan:
    """The settings of one run.

    Attributes:
        inputs: corpus files and folders.
        rows: what the rows are packed for.
        decode: decode every picture fully to check it.
        thinking: what becomes of think blocks.
        media_roots: further folders under which samples may name files.
        max_bad_share: share of samples that cannot be used above which the run stops.
    """

    inputs: tuple[Path, ...]
    rows: RowSettings
    decode: bool = False
    media_roots: tuple[Path, ...] = ()
    max_bad_share: float = 0.05
    thinking: Thinking = field(default_factory=Thinking)

    def measuring(self) -> dict[str, Any]:
        """What measured samples depend on: the files by name, size and time, the processor by its contents."""
        stats = {label: path.stat() for label, path in list_files(self.inputs).items()}
        files = sorted(path for path in self.rows.processor.iterdir() if path.is_file())
        return {
            "inputs": [[label, stat.st_size, stat.st_mtime_ns] for label, stat in stats.items()],
            "processor": {path.name: zlib.crc32(path.read_bytes()) for path in files},
            "decode": self.decode,
            "thinking": asdict(self.thinking),
        }

    def settings(self, num_parts: int = 1) -> dict[str, Any]:
        """What the packed rows depend on."""
        names = ("length", "align", "max_patches", "seed", "model", "skip_long", "shard_mib")
        return self.measuring() | {name: getattr(self.rows, name) for name in names} | {"parts": num_parts}


def pack_samples(plan: Plan, out: Path, num_workers: int = 0, part: Part | None = None) -> dict[str, Any]:
    """Write a packed data set, or one part's share of it.

    Args:
        plan: what to pack, and how.
        out: folder that appears when the data set is complete.
        num_workers: processes that measure; 0 for as many as there are cores. They are spawned, so a script that calls this
            needs an `if __name__ == "__main__"` guard.
        part: the share of this run.

    Returns:
        The report: samples read and kept, dropped by reason, rows, fill (useful tokens / row tokens), tokens, patches, trained,
        cost, seconds. Of a part that is not the last to finish: which part is complete.

    Raises:
        CorpusError: an input or `out` that cannot be used, another process that does this part, or too many unusable samples.
        SampleError: a sample longer than a row, without skip_long.
        ShardError: no sample is usable.
        OSError: a file cannot be written.
    """
    part = part or Part()
    job = Job("pack", out, plan.settings(part.count), part=part, num_workers=num_workers, max_bad_share=plan.max_bad_share)
    with job.claimed():
        return _pack(job, plan)


def _pack(job: Job, plan: Plan) -> dict[str, Any]:
    _keep_measured(job, plan)
    done = job.start()
    if done is not None:
        return done
    part = job.part
    chunks = list_chunks(plan.inputs, media_roots=plan.media_roots)
    job.run_pass(MEASURED, chunks, Measuring(plan.rows.processor, plan.decode, plan.thinking))
    width = len(str(part.count - 1))
    shares = [
        Share(number, tuple(range(number, len(chunks), part.count)), f"{number:0{width}d}-" if part.count > 1 else "")
        for number in range(part.count)
    ]
    if not job.run_pass(ROWS, shares, RowPacking(plan.rows, job.partial / MEASURED, job.partial)):
        name = f"{part.number}/{part.count}"
        return {"tool": "pack", "complete": False, "part": name, "next": "the last part to finish joins all of them"}
    return _join(job, plan, shares, {"measured": round(job.total(MEASURED, chunks).seconds, 1)})


def _keep_measured(job: Job, plan: Plan) -> None:
    """Measured samples of an interrupted run stay of use when only the rows are to be packed in another way."""
    path = job.partial / SETTINGS
    if job.part.count > 1 or not path.exists():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    measuring = json.loads(json.dumps(plan.measuring()))
    settings = found.get("settings", {})
    is_same = found.get("tool") == job.tool and {key: settings.get(key) for key in measuring} == measuring
    if is_same and settings != job.settings and settings.get("parts") == 1:
        shutil.rmtree(job.partial / ROWS, ignore_errors=True)
        (job.partial / REPORT).unlink(missing_ok=True)
        write_json(path, found | {"settings": job.settings})


def _join(job: Job, plan: Plan, shares: Sequence[Share], worker_seconds: dict[str, float]) -> dict[str, Any]:
    """Make one data set of what the parts wrote; the parts may come here together, and the first does it."""
    try:
        with job.alone():
            finished = job.finished()
            if finished is not None:
                return finished
            paths = [chunk_path(job.partial / ROWS, share.number, "index.json") for share in shares]
            indexes = [PackedIndex.model_validate_json(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
            if not indexes:
                raise ShardError(f"{job.partial}: no row to write; the input holds no usable sample")
            index = join_indexes(indexes)
            worker_seconds["rows"] = round(job.total(ROWS, shares).seconds, 1)
            extra = _describe(job, index, shares, plan.rows.length) | {"worker_seconds": worker_seconds}
            shutil.rmtree(job.partial / "processor", ignore_errors=True)
            shutil.copytree(plan.rows.processor, job.partial / "processor")
            write_index(job.partial, index)
            return job.finish([MEASURED, ROWS], shares, extra)
    except FileNotFoundError:
        report = job.finished()
        if report is None:
            raise
        return report


def _describe(job: Job, index: PackedIndex, shares: Sequence[Share], length: int) -> dict[str, Any]:
    """The report's entries about rows."""
    rows = np.concatenate([np.load(job.partial / shard.index) for shard in index.shards])
    costs = np.sort(np.concatenate([np.load(chunk_path(job.partial / ROWS, share.number, "costs.npy")) for share in shares]))
    chances = np.diff((np.arange(len(costs) + 1) / len(costs)) ** PEERS)
    patches = rows[:, COLUMNS.index("patches")]
    return {
        "rows": index.num_rows, "length": length, "fill": round(index.num_tokens / (index.num_rows * length), 4),
        "tokens": index.num_tokens, "patches": int(patches.sum()), "largest_patches": int(patches.max()),
        "trained": int(rows[:, COLUMNS.index("trained")].sum()),
        "cost": {"mean_tokens": round(float(costs.mean()), 1), "spread": round(float(costs.std() / costs.mean()), 4),
                 f"slowest_of_{PEERS}": round(float((costs * chances).sum() / costs.mean()), 4)},
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glmv-data pack`."""
    parser.description = HELP
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="INPUT ... OUT", help="corpus files and folders, then the output"
    )
    parser.add_argument("--processor", type=Path, required=True, metavar="FOLDER",
                        help="of `glmv-data train-tokenizer`, or the model's Hugging Face folder")  # fmt: skip
    parser.add_argument("--length", type=int, required=True, help="tokens of a row; at most data.sequence_length of training")
    parser.add_argument("--align", type=int, default=8, metavar="N",
                        help="round samples up to multiples of this; context parallelism c needs 2 c (default 8)")  # fmt: skip
    parser.add_argument("--patches", type=int, metavar="N", help="most patches in a row (default: no limit)")
    parser.add_argument("--seed", type=int, default=0, help="which short samples share a row (default %(default)s)")
    parser.add_argument("--model", default="glm-4.1v-9b", metavar="PRESET",
                        help="whose cost rows share evenly (default %(default)s)")  # fmt: skip
    parser.add_argument("--media-root", type=Path, action="append", default=[], metavar="FOLDER",
                        help="further folder under which samples may name files; may be repeated")  # fmt: skip
    parser.add_argument("--part", type=Part.parse, default=Part(), metavar="I/N",
                        help="the share of this run: 0/N to N-1/N, all with the same OUT on a shared disk")  # fmt: skip
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that measure (default: cores)")
    parser.add_argument("--shard-mib", type=int, default=1024, metavar="N", help="size that closes a shard (default 1024)")
    parser.add_argument("--decode", action="store_true", help="decode every picture to check it; takes hours for millions")
    parser.add_argument("--max-bad-share", type=float, default=0.05, metavar="X",
                        help="stop when more than this share of samples cannot be used (default %(default)s)")  # fmt: skip
    parser.add_argument("--keep-thinking", action="store_true", help="keep the think blocks of turns before the last question")
    parser.add_argument("--skip-long", action="store_true", help="leave out samples that exceed a row instead of stopping")


def run(args: argparse.Namespace) -> None:
    """Run the tool and print its report."""
    *inputs, out = args.paths
    if not inputs:
        raise ValueError("name at least one INPUT and the folder OUT")
    if args.length < 8 or args.align < 1 or args.shard_mib < 1 or args.workers < 0 or (args.patches or 1) < 1 or args.seed < 0:
        raise ValueError("--length at least 8, --align, --patches and --shard-mib at least 1, --workers and --seed at least 0")
    rows = RowSettings(args.processor, args.length, args.align, args.patches, args.seed, args.model, args.skip_long,
                       args.shard_mib)  # fmt: skip
    plan = Plan(
        tuple(inputs), rows, args.decode, tuple(args.media_root), args.max_bad_share, Thinking(keep_earlier=args.keep_thinking)
    )
    print(json.dumps(pack_samples(plan, out, args.workers, args.part)))
