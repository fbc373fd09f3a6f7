"""`glmv-data pack`: samples to rows of equal length, offline, so that training only reads and decodes.

Packing before training makes the global order of rows a pure function of a few integers, and finds every unusable sample
before a cluster waits for it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.measure import Chunk, Measured, Measuring, Skipped, list_chunks, load_measured, measure_chunk
from megatron_glmv.data.chat import Chat
from megatron_glmv.data.packing import pack_lengths
from megatron_glmv.data.sample import SampleError
from megatron_glmv.data.shards import Picture, ShardWriter

WINDOW = 16
"""Chunks packed together: enough samples to fill rows, few enough to hold in memory."""
CARRIED_BELOW = 0.97
"""Rows less full than this are taken apart again and packed with the next window."""
CHUNKS_A_WORKER = 6
"""A worker process starts in about three seconds; with fewer chunks than this it is not worth it."""
REPORT = "report.json"
SETTINGS = "settings.json"

HELP = """\
Reads JSONL files of samples, measures them (tokens from the processor's tokenizer and chat template, picture sizes from
their headers), packs them into rows of --length tokens and writes OUT:
  index.json               what the rows were packed for; written last
  shard-00000.tar          rows: tokens, loss weights and the untouched bytes of their pictures (a WebDataset tar)
  shard-00000.rows.npy     where each row is
  processor/               a copy of the processor folder
  report.json              samples, rows, fill, tokens, patches, skipped samples by reason; also printed
  skipped.jsonl            the skipped samples by name, where there are any

A sample is one line: {"id": ..., "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"},
{"type": "text", "text": "..."}]}, {"role": "assistant", "content": "..."}]}; paths are relative to the file's folder.
The assistant's turns and the tokens that end them are trained.

A sample that cannot be used stops the tool with its name, unless --skip-bad (and --skip-long for samples longer than a row).
The rows are written into OUT.partial, which becomes OUT at the end: an interrupted run continues with what it had measured,
and a run with the same arguments as a complete OUT only prints its report. EXIF orientation is not applied."""


@dataclass(frozen=True)
class Plan:
    """The settings of one run.

    Attributes:
        inputs: JSONL files.
        processor: folder with tokenizer, template and image settings.
        length: tokens of a row.
        align: samples take their length rounded up to a multiple of this; context parallelism c needs a multiple of 2 c.
        max_patches: most patches in a row, None for no limit.
        seed: decides which short samples share a row, and the order of the rows.
        decode: decode every picture fully to check it.
        skip_bad: count samples that cannot be used instead of stopping.
        skip_long: count samples that exceed a row instead of stopping.
        shard_mib: size at which a shard is closed.
    """

    inputs: tuple[Path, ...]
    processor: Path
    length: int
    align: int = 8
    max_patches: int | None = None
    seed: int = 0
    decode: bool = True
    skip_bad: bool = False
    skip_long: bool = False
    shard_mib: int = 1024

    def measuring(self) -> dict[str, Any]:
        """What measured samples depend on: the files by name, size and time, the processor by its contents."""
        stats = [(path.name, path.stat()) for path in self.inputs]
        files = sorted(path for path in self.processor.iterdir() if path.is_file())
        return {
            "inputs": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
            "processor": {path.name: zlib.crc32(path.read_bytes()) for path in files},
            "decode": self.decode,
        }

    def settings(self) -> dict[str, Any]:
        """What the packed rows depend on."""
        packing = {"length": self.length, "align": self.align, "max_patches": self.max_patches, "seed": self.seed,
                   "skip_bad": self.skip_bad, "skip_long": self.skip_long, "shard_mib": self.shard_mib}  # fmt: skip
        return self.measuring() | packing


def pack_samples(plan: Plan, out: Path, num_workers: int = 0) -> dict[str, Any]:
    """Write a packed data set.

    Args:
        plan: what to pack, and how.
        out: folder that appears when the data set is complete.
        num_workers: processes that measure; 0 chooses by cores and size. They are spawned, so a script that calls this needs
            an `if __name__ == "__main__"` guard.

    Returns:
        The report: samples, rows, fill (useful tokens / row tokens), tokens, patches, trained, skipped by reason, seconds.

    Raises:
        SampleError: a sample that cannot be used, without skip_bad or skip_long.
        ValueError: `out` holds something else, or no sample is usable.
        OSError: a file cannot be read or written.
    """
    started = time.monotonic()
    chat = Chat(plan.processor)
    settings = json.loads(json.dumps(plan.settings()))
    if out.exists():
        return _reuse(out, settings)
    partial = out.with_name(out.name + ".partial")
    measured = partial / "measured"
    _prepare(partial, plan)
    chunks = list_chunks(plan.inputs)
    skipped = _measure(chunks, plan, measured, num_workers)
    writer = ShardWriter(partial, length=plan.length, align=plan.align, vocab_size=chat.vocab_size,
                         image_token=chat.image_token, pad_token=chat.pad_token, image_limits=chat.image.limits,
                         patch_size=chat.image.patch_size, merge_size=chat.image.merge_size,
                         shard_bytes=plan.shard_mib << 20)  # fmt: skip
    totals: Counter[str] = Counter()
    for row in _pack(chunks, plan, measured, skipped):
        writer.write([sample.document for sample in row], [_read_pictures(sample) for sample in row])
        totals["patches"] += sum(sample.num_patches for sample in row)
        totals["trained"] += sum(int((sample.document.loss_weights[1:] > 0).sum()) for sample in row)
    index = writer.close()
    report = {
        "tool": "pack", "samples": index.num_samples, "rows": index.num_rows, "length": plan.length,
        "fill": round(index.num_tokens / (index.num_rows * plan.length), 4), "tokens": index.num_tokens, **totals,
        "skipped": dict(Counter(entry.reason for entry in skipped)), "seconds": round(time.monotonic() - started, 1),
        "settings": settings,
    }  # fmt: skip
    _finish(partial, out, plan, report, skipped)
    return report


def _reuse(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    try:
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{out}: exists and is no data set of this tool; remove it or choose another OUT") from None
    if report.get("settings") != settings:
        keys = [key for key in settings if report.get("settings", {}).get(key) != settings[key]]
        raise ValueError(f"{out}: packed with other {', '.join(keys)}; remove it or choose another OUT")
    return report | {"reused": True}


def _prepare(partial: Path, plan: Plan) -> None:
    """Keep what an interrupted run measured, if it measured the same; otherwise start anew."""
    path, wanted = partial / SETTINGS, json.dumps(plan.measuring())
    if partial.exists() and not (path.exists() and path.read_text(encoding="utf-8") == wanted):
        shutil.rmtree(partial)
    (partial / "measured").mkdir(parents=True, exist_ok=True)
    path.write_text(wanted, encoding="utf-8")


def _measure(chunks: Sequence[Chunk], plan: Plan, folder: Path, num_workers: int) -> list[Skipped]:
    """Measure all chunks; returns the unusable samples in file order."""
    settings = Measuring(plan.processor, plan.decode)
    workers = num_workers or max(1, min(len(os.sched_getaffinity(0)), len(chunks) // CHUNKS_A_WORKER))
    skipped: dict[int, list[Skipped]] = {}
    with tqdm(total=sum(chunk.num_lines for chunk in chunks), desc="measure", unit=" samples") as bar:
        for chunk, found in _run(chunks, settings, folder, workers):
            if found and not plan.skip_bad:
                _refuse(found[0], "fix it, or count such samples with --skip-bad")
            skipped[chunk.number] = found
            bar.update(chunk.num_lines)
    return [entry for number in sorted(skipped) for entry in skipped[number]]


def _run(chunks: Sequence[Chunk], settings: Measuring, folder: Path,
         workers: int) -> Iterator[tuple[Chunk, list[Skipped]]]:  # fmt: skip
    if workers == 1:
        for chunk in chunks:
            yield chunk, measure_chunk(chunk, settings, folder)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(measure_chunk, chunk, settings, folder): chunk for chunk in chunks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _pack(chunks: Sequence[Chunk], plan: Plan, folder: Path, skipped: list[Skipped]) -> Iterator[list[Measured]]:
    """Rows of samples, window by window; samples that exceed a row are appended to `skipped`."""
    pool: list[Measured] = []
    with tqdm(total=sum(chunk.num_lines for chunk in chunks), desc="pack", unit=" samples") as bar:
        for first in range(0, len(chunks), WINDOW):
            for chunk in chunks[first : first + WINDOW]:
                pool += [sample for sample in load_measured(chunk, folder) if _fits(sample, plan, skipped)]
            is_last = first + WINDOW >= len(chunks)
            rows = pack_lengths(
                [len(sample.document.tokens) for sample in pool], plan.length, align=plan.align, seed=plan.seed,
                patches=[sample.num_patches for sample in pool], max_patches=plan.max_patches,
            )  # fmt: skip
            carried: list[int] = []
            for row in rows:
                if is_last or _fill([pool[place] for place in row], plan) >= CARRIED_BELOW:
                    yield [pool[place] for place in row]
                    bar.update(len(row))
                else:
                    carried += row
            pool = [pool[place] for place in sorted(carried)]


def _fits(sample: Measured, plan: Plan, skipped: list[Skipped]) -> bool:
    tokens, patches = len(sample.document.tokens), sample.num_patches
    if -(-tokens // plan.align) * plan.align > plan.length:
        entry = Skipped(sample.document.key, "longer than a row", f"{tokens} tokens, a row has {plan.length}")
        hint = "raise --length"
    elif plan.max_patches is not None and patches > plan.max_patches:
        entry = Skipped(sample.document.key, "more patches than a row", f"{patches} patches, a row has {plan.max_patches}")
        hint = "raise --patches"
    else:
        return True
    if not plan.skip_long:
        _refuse(entry, f"{hint}, or count such samples with --skip-long")
    skipped.append(entry)
    return False


def _refuse(entry: Skipped, hint: str) -> None:
    raise SampleError(entry.key, entry.reason, f"{entry.detail}; {hint}" if entry.detail else hint)


def _fill(row: Sequence[Measured], plan: Plan) -> float:
    """How full a row is, by the budget that is nearer to its end."""
    tokens = sum(-(-len(sample.document.tokens) // plan.align) * plan.align for sample in row) / plan.length
    patches = sum(sample.num_patches for sample in row) / plan.max_patches if plan.max_patches else 0.0
    return max(tokens, patches)


def _read_pictures(sample: Measured) -> list[Picture]:
    pictures = []
    for file in sample.media:
        path = Path(file.path)
        pictures.append(Picture(path.read_bytes(), path.suffix.lstrip("."), file.height, file.width))
    return pictures


def _finish(partial: Path, out: Path, plan: Plan, report: dict[str, Any], skipped: Sequence[Skipped]) -> None:
    processor = partial / "processor"
    shutil.rmtree(processor, ignore_errors=True)
    shutil.copytree(plan.processor, processor)
    (partial / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if skipped:
        lines = [json.dumps({"key": entry.key, "reason": entry.reason, "detail": entry.detail}) for entry in skipped]
        (partial / "skipped.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.rmtree(partial / "measured")
    (partial / SETTINGS).unlink()
    partial.rename(out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glmv-data pack`."""
    parser.description = HELP
    parser.add_argument("paths", type=Path, nargs="+", metavar="INPUT.jsonl ... OUT", help="files of samples, then the folder")
    parser.add_argument("--processor", type=Path, required=True, metavar="FOLDER",
                        help="of `glmv-data train-tokenizer`, or the model's Hugging Face folder")  # fmt: skip
    parser.add_argument("--length", type=int, required=True, help="tokens of a row; at most data.sequence_length of training")
    parser.add_argument("--align", type=int, default=8, metavar="N",
                        help="round samples up to multiples of this; context parallelism c needs 2 c (default 8)")  # fmt: skip
    parser.add_argument("--patches", type=int, metavar="N", help="most patches in a row (default: no limit)")
    parser.add_argument("--seed", type=int, default=0, help="which short samples share a row (default %(default)s)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that measure (default: by size)")
    parser.add_argument("--shard-mib", type=int, default=1024, metavar="N", help="size that closes a shard (default 1024)")
    parser.add_argument("--headers-only", action="store_true", help="do not decode pictures to check them")
    parser.add_argument("--skip-bad", action="store_true", help="count samples that cannot be used instead of stopping")
    parser.add_argument("--skip-long", action="store_true", help="count samples that exceed a row instead of stopping")


def run(args: argparse.Namespace) -> None:
    """Run the tool and print its report."""
    *inputs, out = args.paths
    if not inputs:
        raise ValueError("name at least one INPUT.jsonl and the folder OUT")
    if args.length < 8 or args.align < 1 or args.shard_mib < 1 or args.workers < 0 or (args.patches or 1) < 1 or args.seed < 0:
        raise ValueError("--length at least 8, --align, --patches and --shard-mib at least 1, --workers and --seed at least 0")
    plan = Plan(tuple(inputs), args.processor, args.length, args.align, args.patches, args.seed, not args.headers_only,
                args.skip_bad, args.skip_long, args.shard_mib)  # fmt: skip
    print(json.dumps(pack_samples(plan, out, args.workers)))
