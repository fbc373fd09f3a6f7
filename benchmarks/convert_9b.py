"""Time and memory of `glmv import`, `glmv export` and `glmv verify` on the 9B with random bf16 weights, beside a plain copy.

    python benchmarks/convert_9b.py FOLDER

needs 62 GB of free disk in FOLDER for all 40 layers, and takes fewer layers where there is less (and says so). Every command
runs as a user runs it, in a process of its own, on files that are no longer in the page cache; the copy is synced to the disk,
as the commands sync what they write.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from megatron_glmv.config.model import PRESETS, ModelShape
from megatron_glmv.config.weight_map import hf_names
from megatron_glmv.convert.hf_folder import write_weights

COPIES = 3
"""Folders of that size that exist at once: source, checkpoint, export."""
MEMORY_GATE, TIME_GATE = 3e9, 2.0
"""Bytes of resident memory, and time in plain copies, that import and export may take."""


def main() -> int:
    """Run every command once and print the table; 1 when a gate is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; emptied at the end")
    parser.add_argument("--layers", type=int, help="decoder layers (default: 40, or what the disk has room for)")
    arguments = parser.parse_args()
    work = arguments.folder / "convert_9b"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        return _measure(work, arguments.layers)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _measure(work: Path, layers: int | None) -> int:
    config = json.loads((PRESETS / "glm-4.1v-9b.json").read_text(encoding="utf-8"))
    full = config["text_config"]["num_hidden_layers"]
    config, shape = _fitting(config, layers or full, shutil.disk_usage(work).free)
    used = shape.text.num_layers
    size = sum(torch.Size(s).numel() for s in hf_names(shape).values()) * 2
    print(
        f"{used} of {full} decoder layers, {size / 1e9:.1f} GB in bfloat16; {os.cpu_count()} cores, torch {torch.__version__}"
    )
    source = work / "hf"
    _report("random weights", _timed(lambda: _write_folder(source, config, shape)), None, None)
    seconds = _timed(lambda: _copy(_cold(source), work / "copy"))
    _report("plain copy", seconds, seconds, None)
    shutil.rmtree(work / "copy")
    missed = False
    for name, read, command in (
        ("import", source, ["import", source, work / "checkpoint", "--no-verify"]),
        ("export", work / "checkpoint", ["export", work / "checkpoint", work / "exported", "--no-verify"]),
        ("verify", work / "exported", ["verify", work / "exported", work / "checkpoint"]),
    ):
        _cold(read)
        took, peak = _run(command)
        _report(f"glmv {name}", took, seconds, peak)
        missed |= name != "verify" and (peak > MEMORY_GATE or took > TIME_GATE * seconds)
    same = all((source / path.name).read_bytes() == path.read_bytes() for path in (work / "exported").glob("*.index.json"))
    same = same and all(_equal_files(path, source / path.name) for path in sorted((work / "exported").glob("*.safetensors")))
    print(f"exported safetensors equal the source's files: {same}")
    print(f"gates: below {MEMORY_GATE / 1e9:.0f} GB and {TIME_GATE:.0f} plain copies for import and for export:", end=" ")
    print("missed" if missed or not same else "held")
    return int(missed or not same)


def _fitting(config: dict[str, Any], layers: int, free: int) -> tuple[dict[str, Any], ModelShape]:
    """The configuration with as many decoder layers as `free` bytes take."""
    while True:
        tree = copy.deepcopy(config)
        tree["text_config"]["num_hidden_layers"] = layers
        shape = ModelShape.from_hf(tree, "benchmark")
        size = sum(torch.Size(s).numel() for s in hf_names(shape).values()) * 2
        if size * COPIES * 1.01 < free or layers == 1:
            return tree, shape
        layers -= 1


def _write_folder(folder: Path, config: dict[str, Any], shape: ModelShape) -> None:
    """A Hugging Face folder with random weights: matrices of deviation 0.02, norms around 1."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def draw() -> Iterator[tuple[str, Tensor]]:
        for name, size in hf_names(shape).items():
            mean, deviation = (1.0, 0.1) if len(size) == 1 and not name.endswith("bias") else (0.0, 0.02)
            yield name, torch.empty(size).normal_(mean, deviation, generator=generator).bfloat16()

    write_weights(folder, hf_names(shape), dict.fromkeys(hf_names(shape), torch.bfloat16), draw())
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    special = shape.tokens
    tokens = {"<|endoftext|>": special.pad, "<|image|>": special.image, "<|video|>": special.video}
    for kind in ("image", "video"):
        tokens[f"<|begin_of_{kind}|>"] = getattr(special, f"{kind}_start")
        tokens[f"<|end_of_{kind}|>"] = getattr(special, f"{kind}_end")
    tokens |= {f"<end {number}>": number for number in special.eos if number != special.pad}
    Tokenizer(WordLevel(tokens, "<|endoftext|>")).save(str(folder / "tokenizer.json"))
    settings = {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text("", encoding="utf-8")
    (folder / "preprocessor_config.json").write_text("{}", encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    """Copy the files of a folder and wait until they are on the disk."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as stream:
            os.fsync(stream.fileno())


def _cold(folder: Path) -> Path:
    """Take a folder's files out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return folder


def _run(command: Sequence[object]) -> tuple[float, int]:
    """Run a `glmv` command: seconds, and bytes of resident memory at its peak."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "megatron_glmv", *map(str, command)])
    peak = 0
    while process.poll() is None:
        # The high-water mark of this process alone; getrusage would count what its parent held when it was started.
        with contextlib.suppress(OSError, StopIteration):
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            peak = 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"glmv {command[0]} failed")
    return time.monotonic() - started, peak


def _timed(action: Callable[[], object]) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started


def _equal_files(one: Path, other: Path) -> bool:
    with one.open("rb") as a, other.open("rb") as b:
        while True:
            x, y = a.read(1 << 24), b.read(1 << 24)
            if x != y:
                return False
            if not x:
                return True


def _report(name: str, seconds: float, copy_seconds: float | None, peak: int | None) -> None:
    ratio = f"{seconds / copy_seconds:5.2f} x copy" if copy_seconds else " " * 12
    memory = f"  peak {peak / 1e9:.2f} GB" if peak else ""
    print(f"{name:16} {seconds:7.1f} s  {ratio}{memory}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
