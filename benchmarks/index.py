"""What opening the index of a billion samples costs a rank: `python benchmarks/index.py FOLDER`.

Writes a data set that has every file of a real one and no contents: index.json in full, one tar and one rows.npy a shard as
sparse files of the right size. Then a fresh process opens it as training does, draws rows of the global order and reads their
entries. Prints seconds and the growth of resident memory, beside the process's own.

A billion samples are fewer rows: `--samples-per-row` 8 documents of about 1,000 tokens in rows of 8,192 make 125,000,000 rows.
A shard holds `--rows-per-shard`: 2,000 rows of half a megabyte are 1 GB. `--samples-per-row 1` is the worst case: a row each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from megatron_glmv.data.index import COLUMNS, FORMAT, INDEX, VERSION

ROW_BYTES = 500_000
DRAWN = 2_000
GATE_SECONDS, GATE_MEGABYTES = 1.0, 200.0


def write_synthetic(folder: Path, samples: int, samples_per_row: int, rows_per_shard: int) -> int:
    """Write the files of a data set without their contents; returns how many shards there are."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = samples // samples_per_row
    shards = []
    header = _npy_header(rows_per_shard)
    for number in range(-(-rows // rows_per_shard)):
        own = min(rows_per_shard, rows - number * rows_per_shard)
        tar, table = f"shard-{number:07d}.tar", f"shard-{number:07d}.rows.npy"
        with (folder / tar).open("wb") as file:
            file.truncate(own * ROW_BYTES)
        with (folder / table).open("wb") as file:
            head = header if own == rows_per_shard else _npy_header(own)
            file.write(head)
            file.truncate(len(head) + own * len(COLUMNS) * 8)
        shards.append({"file": tar, "rows": own, "size_bytes": own * ROW_BYTES, "index": table})
    tree = {
        "format": FORMAT, "version": VERSION, "length": 8192, "align": 8, "num_rows": rows, "num_samples": samples,
        "num_tokens": rows * 8000, "vocab_size": 151552, "tokens": {"image": 151343, "pad": 151329},
        "image_limits": {"min_pixels": 12544, "max_pixels": 9633792}, "shards": shards,
    }  # fmt: skip
    (folder / INDEX).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return len(shards)


def _npy_header(rows: int) -> bytes:
    """The head of an .npy file of int64 [rows, columns]."""
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({rows}, {len(COLUMNS)}), }}"
    padded = text + " " * (-(10 + len(text) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + np.uint16(len(padded)).tobytes() + padded.encode()


MEASURE = """
import resource, sys, time
from pathlib import Path
from megatron_glmv.data.order import GlobalOrder
from megatron_glmv.data.shard_reader import ShardReader

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

before = resident()
started, computing = time.perf_counter(), time.process_time()
reader = ShardReader(Path(sys.argv[1]))
order = GlobalOrder(["a"], [1.0], [len(reader)], seed=1, global_batch_rows=64)
opened, computed, after = time.perf_counter() - started, time.process_time() - computing, resident() - before
started = time.perf_counter()
draws = int(sys.argv[2])
for position in range(draws):
    reader.measures(order.at(position).row)
print(opened, computed, after, (time.perf_counter() - started) / draws * 1e3, resident() - before, before)
"""


def main() -> int:
    """Write, measure, print; 1 where a gate is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="scratch folder; removed when done")
    parser.add_argument("--samples", type=int, default=1_000_000_000)
    parser.add_argument("--samples-per-row", type=int, default=8)
    parser.add_argument("--rows-per-shard", type=int, default=2_000)
    arguments = parser.parse_args()
    started = time.perf_counter()
    try:
        shards = write_synthetic(arguments.folder, arguments.samples, arguments.samples_per_row, arguments.rows_per_shard)
        size = (arguments.folder / INDEX).stat().st_size / 1e6
        print(f"written     {shards:,} shards, index.json {size:.1f} MB, in {time.perf_counter() - started:.0f} s")
        run = [sys.executable, "-c", MEASURE, str(arguments.folder), str(DRAWN)]
        found = subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    opened, computed, grown, each_ms, grown_after, base = map(float, found)
    rows = arguments.samples // arguments.samples_per_row
    print(f"samples     {arguments.samples:,} in {rows:,} rows")
    print(f"open        {opened:.2f} s ({computed:.2f} s of computing), {grown:.0f} MB beside the {base:.0f} MB of the process")
    print(f"draw        {each_ms:.2f} ms a row, {grown_after:.0f} MB after {DRAWN:,} rows")
    return int(opened > GATE_SECONDS or grown_after > GATE_MEGABYTES)


if __name__ == "__main__":
    sys.exit(main())
