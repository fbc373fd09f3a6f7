"""Whether the loader keeps up: photos that decode a second on the GPU and on the CPU, and how long a training step waits.

    python benchmarks/gpu_decode.py [--layers N]     # one CUDA device, about 4 minutes
    python benchmarks/gpu_decode.py --dry-run        # anywhere: the plan
    python benchmarks/gpu_decode.py --quick          # anywhere: a tiny model, CPU decoding where there is no GPU

Rows of 8,192 tokens, 60 % of them photos of 0.25 to 1.4 megapixels as JPEG, are read from packed shards. "alone" reads and
decodes them and does nothing else; "in training" decodes them while the slice of `gpu_mfu.py` trains in BF16, beside the same
rows held decoded in memory. What the step needs is what it takes when it never waits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from gpu_slice import TINY, Settings, device_memory_gb, fitting, plan, run, slice_config, write_rows

from megatron_glmv.data.loader import RowStream
from megatron_glmv.parallel import platform

TARGET = 0.01
"""Share of a step that may be spent waiting for rows."""
DECODING_GB = 4
"""Device memory left for decoding."""


def main() -> int:
    """Parse the command line, run or plan, print the table; 1 when a run fails or, but for --quick, steps wait."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="decoder layers; default: as many as fit")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--steps", type=int, default=12, help="timed steps")
    parser.add_argument("--dry-run", action="store_true", help="print the plan")
    parser.add_argument("--quick", action="store_true", help="the quickstart's model, two steps")
    arguments = parser.parse_args()
    platform.activate()
    settings = TINY if arguments.quick else Settings(layers=arguments.layers or 4, rows=arguments.rows, steps=arguments.steps)
    if arguments.layers is None and not arguments.quick:
        settings = fitting(settings, device_memory_gb() - DECODING_GB)
    if arguments.dry_run:
        amounts = plan(settings, device_memory_gb() - DECODING_GB)
        print(f"{settings.layers} decoder layers, {amounts.patches:,} patches and {amounts.row_tflop:.1f} TFLOP a row, "
              f"{amounts.memory_gb:.1f} GB estimated; at 40 % of an H100's BF16 peak a row takes "
              f"{amounts.row_tflop / 396:.2f} s")  # fmt: skip
        return 0
    if not torch.cuda.is_available() and not arguments.quick:
        print("skipped: no CUDA device here; --dry-run prints the plan, --quick runs a tiny model")
        return 0
    return compare(settings, arguments.quick)


def compare(settings: Settings, quick: bool) -> int:
    """Run every way and print the table."""
    devices = ["cpu", "gpu"] if torch.cuda.is_available() else ["cpu"]
    needed = run(settings)
    if "error" in needed:
        print(f"failed: {needed['error']}", file=sys.stderr)
        return 1
    print(f"{settings.preset}, {settings.layers} decoder layers, {settings.rows} rows of {settings.length:,} tokens a step, "
          f"{needed['device']}; rows in memory: {needed['seconds']:.3f} s a step, which takes {needed['pictures_s']:.1f} "
          "photos/s\n")  # fmt: skip
    print("| decoded on | photos/s alone | of what the step needs | s a step in training | waiting for rows |")
    print("| --- " * 5 + "|", flush=True)
    failed, missed = [], []
    for device in devices:
        alone = decode_alone(replace(settings, decode=device))
        trained = run(replace(settings, decode=device))
        if "error" in trained:
            print(f"| {device} | {alone:.1f} | | failed: {trained['error']} | |", flush=True)
            failed.append(f"decoding on {device}")
            continue
        print(f"| {device} | {alone:.1f} | {alone / needed['pictures_s']:.2f} | {trained['seconds']:.3f} | "
              f"{trained['wait_share']:.2%} |", flush=True)  # fmt: skip
        if device == "gpu" and trained["wait_share"] > TARGET and not quick:
            missed.append("waiting for rows decoded on the gpu")
    if failed or missed:
        print(f"missed: {', '.join([*failed, *missed])}", file=sys.stderr)
    return 1 if failed or missed else 0


def decode_alone(settings: Settings) -> float:
    """Photos a second of the loader with nothing beside it, its start left out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = slice_config(folder, settings, on_gpu=platform.has_cuda())
        shape = config.model.shape
        write_rows(folder / "rows", settings, shape)
        stream = RowStream(config.data.sources, config.data, shape, seed=0, global_batch_rows=settings.rows, data_rank=0,
                           data_size=1, decode=True, align=1)  # fmt: skip
        # What was read ahead while nobody asked does not count: it is drained before the clock starts.
        drained = -(-config.data.prefetch_rows // settings.rows) + 1
        for step in range(drained):
            stream.step(step)
        started, pictures = time.perf_counter(), 0
        for step in range(drained, drained + settings.steps):
            pictures += sum(len(row.frames) for row in stream.step(step).rows)
        seconds = time.perf_counter() - started
        stream.close()
    return pictures / seconds


if __name__ == "__main__":
    sys.exit(main())
