"""Packing: how full rows are, how evenly they cost, and how long a million samples take, against a plain first-fit.

    python benchmarks/pack.py                        # the algorithm, on two made-up mixtures at 8,192 and 32,768 tokens
    python benchmarks/pack.py --corpus 100000        # `glmv-data pack` itself, from files to shards

Text is long-tailed (log-normal, median 500 tokens). The picture mixture has 30 % text, 55 % samples of one picture and 15 % of
two to eight, each of 16 to 6,144 tokens. "slowest of 8" is the cost of the costliest of 8 random rows over the mean: what a
step of 8 replicas takes, where 1.00 is perfect balance; cost is that of `megatron_glmv/sequence/cost.py`, padding included.
The bound is what no packing beats: a sample that costs more than the mean row makes a costly row wherever it stands.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_glmv.config.model import ModelConfig
from megatron_glmv.data.even_rows import step_cost
from megatron_glmv.data.packing import pack_lengths
from megatron_glmv.sequence.cost import cost_model

ALIGN = 8
Ints = npt.NDArray[np.int64]


def draw_lengths(kind: str, count: int, length: int) -> tuple[Ints, Ints, Ints]:
    """Tokens, patches and sum of squared patches of `count` samples; kind is text or pictures."""
    random = np.random.default_rng(0)
    text = np.clip(random.lognormal(np.log(500), 1.1, count), 16, length).astype(np.int64)
    if kind == "text":
        return text, np.zeros(count, np.int64), np.zeros(count, np.int64)
    share = random.random(count)
    pictures = np.where(share < 0.3, 0, np.where(share < 0.85, 1, random.integers(2, 9, count)))
    words = np.clip(random.lognormal(np.log(150), 1.1, count), 16, length).astype(np.int64)
    tokens, patches, squares = np.where(pictures == 0, text, np.minimum(words, length // 4)), *np.zeros((2, count), np.int64)
    for number in range(8):
        size = np.clip(random.lognormal(np.log(600), 0.9, count), 16, 6144).astype(np.int64)
        shown = (number < pictures) & (tokens + size + 2 <= length)
        tokens += np.where(shown, size + 2, 0)
        patches += np.where(shown, 4 * size, 0)
        squares += np.where(shown, (4 * size) ** 2, 0)
    return tokens, patches, squares


def first_fit(lengths: Ints, length: int) -> list[list[int]]:
    """Each sample, in the order of the corpus, into the first row that takes it."""
    sizes = (-(-lengths // ALIGN)).tolist()
    room = np.full(len(lengths), length // ALIGN, dtype=np.int32)
    rows: list[list[int]] = []
    for sample, size in enumerate(sizes):
        row = int(np.argmax(room[: len(rows) + 1] >= size))
        if row == len(rows):
            rows.append([])
        rows[row].append(sample)
        room[row] -= size
    return rows


def in_windows(lengths: Ints, length: int, extra: npt.NDArray[np.float64], window: int) -> list[list[int]]:
    """The packer of `glmv-data pack`, `window` samples at a time, without carrying half-empty rows on."""
    rows: list[list[int]] = []
    for start in range(0, len(lengths), window):
        part = slice(start, start + window)
        rows += [
            [start + sample for sample in row] for row in pack_lengths(lengths[part], length, align=ALIGN, extra=extra[part])
        ]
    return rows


def compare(count: int) -> None:
    """Print one table a mixture and row length."""
    costs = cost_model(ModelConfig(preset="glm-4.1v-9b").shape)
    for kind in ("text", "pictures"):
        for length in (8192, 32_768):
            lengths, patches, squares = draw_lengths(kind, count, length)
            extra = costs.extra(lengths, lengths - patches // 4, patches, squares)
            ways: dict[str, Callable[[], list[list[int]]]] = {
                "first-fit": partial(first_fit, lengths, length),
                "best-fit": partial(pack_lengths, lengths, length, align=ALIGN),
                "even, all at once": partial(pack_lengths, lengths, length, align=ALIGN, extra=extra),
                "even, windows of 262,144": partial(in_windows, lengths, length, extra, 1 << 18),
                "even, windows of 16,384": partial(in_windows, lengths, length, extra, 1 << 14),
            }
            print(f"\n{kind}, {count:,} samples, rows of {length:,} tokens; {lengths.mean():.0f} tokens a sample")
            heads = ("rows", "fill", "s a million", "cost spread", "slowest of 8", "patches p99/mean")
            print(" " * 26 + "".join(f"{head:>{width}}" for head, width in zip(heads, (9, 9, 13, 13, 14, 18), strict=True)))
            num_rows = -(-int((-(-lengths // ALIGN) * ALIGN).sum()) // length)
            spread, slowest = evenest(extra, length, num_rows)
            print(f"{'(bound)':26}{num_rows:9,}{lengths.sum() / num_rows / length:9.2%}{'':13}{spread:13.4f}{slowest:14.4f}")
            for name, way in ways.items():
                started = time.process_time()
                rows = way()
                seconds = (time.process_time() - started) * 1e6 / count
                own = np.array([length + extra[row].sum() for row in rows])
                held = np.array([patches[row].sum() for row in rows])
                slowest = step_cost(rows, length, extra) / own.sum()
                skew = f"{np.percentile(held, 99) / held.mean():.3f}" if held.any() else "-"
                print(f"{name:26}{len(rows):9,}{lengths.sum() / len(rows) / length:9.2%}{seconds:13.1f}"
                      f"{own.std() / own.mean():13.4f}{slowest:14.4f}{skew:>18}", flush=True)  # fmt: skip


def evenest(costs: npt.NDArray[np.float64], length: int, num_rows: int) -> tuple[float, float]:
    """Spread and slowest of 8 that no packing can beat: samples costlier than the mean row alone, all else even."""
    ordered, left, alone = np.sort(costs)[::-1], float(costs.sum()), 0
    while ordered[alone] > left / (num_rows - alone):
        left -= float(ordered[alone])
        alone += 1
    rows = length + np.concatenate([ordered[:alone], np.full(num_rows - alone, left / (num_rows - alone))])
    chances = np.diff((np.arange(num_rows + 1) / num_rows) ** 8)
    return rows.std() / rows.mean(), float((np.sort(rows) * chances).sum() / rows.mean())


def write_corpus(folder: Path, count: int) -> None:
    """A JSONL file of `count` samples over 2,000 JPEG pictures; seven of ten samples have one, texts are long-tailed."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(2000):
        height, width = random.integers(120, 900, 2)
        noise = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((int(width), int(height)))
        noise.save(folder / "images" / f"{number}.jpg", quality=60)
    words = np.array(
        ["the", "a", "of", "picture", "shows", "two", "red", "boxes", "table", "near", "old", "wall", "windows", "light"]
    )
    sizes = np.clip(random.lognormal(np.log(40), 1.0, count), 3, 2000).astype(int)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for number, size in enumerate(sizes.tolist()):
            shown = [{"type": "image", "image": f"images/{random.integers(2000)}.jpg"}] if random.random() < 0.7 else []
            answer = " ".join(words[random.integers(0, len(words), size)])
            turns = [{"role": "user", "content": [*shown, {"type": "text", "text": "Describe it."}]},
                     {"role": "assistant", "content": answer}]  # fmt: skip
            file.write(json.dumps({"id": f"sample-{number}", "messages": turns}) + "\n")


def run_tool(count: int, folder: Path, processor: Path, length: int) -> None:
    """Time `glmv-data pack` on a corpus of files and print what a million samples would take."""
    for old in ("raw", "rows", "rows.partial"):
        shutil.rmtree(folder / old, ignore_errors=True)
    write_corpus(folder / "raw", count)
    started = time.monotonic()
    command = [sys.executable, "-m", "data_tools", "pack", folder / "raw" / "samples.jsonl", folder / "rows", "--processor",
               processor, "--length", length, "--skip-long"]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall = time.monotonic() - started
    report = json.loads((folder / "rows" / "report.json").read_text(encoding="utf-8"))
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak, cpu = usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime
    size = sum(path.stat().st_size for path in (folder / "rows").glob("*.tar")) / 2**30
    print(f"{count:,} samples, {report['tokens'] / count:.0f} tokens each: {wall:.1f} s, {wall / count * 1e6:.0f} s a million, "
          f"{cpu / count * 1e6:.0f} core seconds a million; "
          f"worker seconds {report['worker_seconds']}; fill {report['fill']}; {size:.2f} GiB written; "
          f"largest process {peak:.0f} MiB")  # fmt: skip


def main() -> None:
    """Parse the command line and run one of the two measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--corpus", type=int, metavar="N", help="pack a corpus of N samples from files instead")
    parser.add_argument("--processor", type=Path, help="for --corpus: a processor folder")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-pack"), help="for --corpus: where to write")
    parser.add_argument("--length", type=int, default=8192, help="for --corpus")
    args = parser.parse_args()
    if args.corpus:
        run_tool(args.corpus, args.folder, args.processor, args.length)
    else:
        compare(args.samples)


if __name__ == "__main__":
    main()
