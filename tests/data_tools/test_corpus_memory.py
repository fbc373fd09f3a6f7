"""The memory of a tool does not grow with the corpus."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_tools import cli
from tests.data_tools.fuzzed import jpeg, pair

DISTINCT = 40


def watch(arguments: list[str], partial: Path) -> list[tuple[int, int]]:
    """Run a command in one process; (chunks done in all passes, resident bytes) every few milliseconds."""
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    seen, done = [], 0
    with subprocess.Popen(
        [sys.executable, "-m", "data_tools", *arguments], env=environment, stderr=subprocess.DEVNULL
    ) as process:
        own = psutil.Process(process.pid)
        while process.poll() is None:
            # At the end the folder with the marks is gone, and what counts is the most that was seen.
            done = max(done, len(list(partial.glob("*/*.done.json"))))
            try:
                seen.append((done, own.memory_info().rss))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.02)
    assert process.returncode == 0
    return seen


@pytest.mark.parametrize(
    ("tool", "form", "num"),
    [("filter", "webdataset", 600), pytest.param("filter", "parquet", 10_000, marks=pytest.mark.slow),
     pytest.param("filter", "webdataset", 10_000, marks=pytest.mark.slow),
     pytest.param("dedupe", "jsonl", 10_000, marks=pytest.mark.slow)],
)  # fmt: skip
def test_memory_is_flat_over_many_pictures(tool: str, form: str, num: int, tmp_path: Path) -> None:
    for seed in range(DISTINCT):
        (tmp_path / f"{seed}.jpg").write_bytes(jpeg(seed, 480, 640))
    chunk = num // 20
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(num):
            file.write(json.dumps(pair(f"s{number}", f"{number % DISTINCT}.jpg")) + "\n")
    frame = ["--form", form, "--workers", "1", "--chunk", str(chunk)]
    seen = watch([tool, str(tmp_path / "a.jsonl"), str(tmp_path / "out"), *frame], tmp_path / "out.partial")
    chunks = 20 if tool == "filter" else 40
    # A chunk's pictures pass one by one (Parquet: a row group of at most 64 MiB); the first quarter meets the largest of each.
    early = max(size for done, size in seen if done <= chunks // 4)
    late = max(size for done, size in seen if done > chunks // 4)
    print(f"{tool} {form} {num}: {early >> 20} MiB in the first quarter, {late >> 20} MiB after it")
    # Kept bytes would add 70 KB a picture and kept previews 260 KB: 30 and 110 MiB in the small case.
    assert late < early + (25 << 20 if num < 1000 else 64 << 20)
    assert late < 700 << 20
