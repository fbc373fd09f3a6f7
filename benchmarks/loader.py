"""Pictures a second of the loader, beside a PyTorch DataLoader with transformers' processor, and how much of it a step hides.

    python benchmarks/loader.py FOLDER

The same files on the same cores: `loader` reads packed rows up to the tensors that the training device receives,
`transformers` is a DataLoader with as many workers as cores and `Glm4vImageProcessor` (torchvision), `bare` decodes and resizes
and does nothing else. Rounds are interleaved and medians are given, because other work on the machine moves every figure.
Hiding is measured with a step as long as the loading: one that leaves the processor alone, as a GPU does, which is what is
promised, and one that keeps a core busy, which needs a core to itself.

torchvision is taken from .venv/parity, where `bash tests/run.sh` installs it; without it the DataLoader is left out.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch
from PIL import Image

from megatron_glmv.config.data import DataConfig, SourceConfig
from megatron_glmv.config.model import ModelConfig, ModelShape
from megatron_glmv.data.loader import RowStream
from megatron_glmv.data.media import Picture
from megatron_glmv.data.resize import resize
from megatron_glmv.data.shard_writer import ShardWriter
from megatron_glmv.sequence.grid import PixelLimits, image_grid, smart_resize
from megatron_glmv.sequence.packed import Document

LENGTH = 8192
PER_ROW = 8
SPEED_GATE, BARE_GATE, HIDDEN_GATE = 2.0, 0.9, 0.8
"""Times transformers, share of bare decode and resize, and share of loading hidden, that are promised."""
KINDS = ("idle core", "busy core")
"""What a step does to the processor while it runs."""
DECLARED: list[torch.library.Library] = []
"""Kept alive for the life of the process."""
PARITY = Path(__file__).parents[1] / ".venv" / "parity"


def main() -> int:
    """Measure, print the table and a JSON line; 1 when a gate is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where pictures and rows are written; removed at the end")
    parser.add_argument("--pictures", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    work = arguments.folder / "loader"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    torch.set_num_threads(1)
    try:
        return _measure(work, arguments.pictures, arguments.rounds, arguments.cores)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _measure(work: Path, num_pictures: int, rounds: int, cores: int) -> int:
    files = list(write_pictures(work / "pictures", num_pictures))
    write_rows(work / "rows", files)
    ways: dict[str, Callable[[], float]] = {"loader": lambda: run_loader(work / "rows", num_pictures, cores)}
    processor = load_processor()
    if processor is not None:
        ways["transformers"] = lambda: run_transformers(files, processor, cores)
    ways["bare"] = lambda: run_bare(files, cores)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(way())
    rates = {name: num_pictures / statistics.median(found) for name, found in times.items()}
    pairs = [mine / other for mine, other in zip(times["bare"], times["loader"], strict=True)]
    report: dict[str, Any] = {
        "pictures_s": {name: round(rate, 1) for name, rate in rates.items()},
        "times_bare": round(statistics.median(pairs), 2),
        "bytes_a_picture": bytes_a_picture(files),
        "hidden": {kind: _median_hidden(work / "rows", num_pictures, cores, kind, rounds) for kind in KINDS},
        "pictures": num_pictures, "rounds": rounds, "cores": cores,
    }  # fmt: skip
    missed = [] if report["times_bare"] >= BARE_GATE else ["bare"]
    if "transformers" in times:
        ratios = [other / mine for mine, other in zip(times["loader"], times["transformers"], strict=True)]
        report["times_transformers"] = round(statistics.median(ratios), 2)
        missed += [] if report["times_transformers"] >= SPEED_GATE else ["transformers"]
    missed += ["hidden"] if report["hidden"][KINDS[0]] < HIDDEN_GATE else []
    print(json.dumps(report))
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def write_pictures(folder: Path, number: int) -> Iterator[Path]:
    """Photo-like pictures of 0.1 to 1 megapixel: eight in ten JPEG, the rest PNG and WebP."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(number):
        height, width = (int(side) for side in rng.integers(320, 1_000, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (height // 24, width // 24, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        picture = Image.fromarray(np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8))
        form = {8: "PNG", 9: "WEBP"}.get(index % 10, "JPEG")
        path = folder / f"{index:05d}.{form.lower()}"
        picture.save(path, form, **({"quality": 90} if form != "PNG" else {"compress_level": 6}))
        yield path


def write_rows(folder: Path, files: list[Path]) -> None:
    """Rows of PER_ROW pictures and a few words."""
    shape, limits = _shape(), PixelLimits()
    ids = shape.tokens
    writer = ShardWriter(folder, length=LENGTH, align=8, vocab_size=shape.text.vocab_size, image_token=ids.image,
                         pad_token=ids.pad, image_limits=limits)  # fmt: skip
    for start in range(0, len(files), PER_ROW):
        documents, media = [], []
        for path in files[start : start + PER_ROW]:
            data = path.read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                picture = Picture(data, path.suffix[1:], image.height, image.width)
            grid = image_grid(picture.height, picture.width, limits)
            tokens = np.array([ids.image_start, *[ids.image] * grid.num_tokens(), ids.image_end, *range(30, 60)])
            documents.append(Document(tokens, np.ones(len(tokens)), (grid.frame,), path.name))
            media.append([picture])
        writer.write(documents, media)
    writer.close()


def open_stream(folder: Path, threads: int) -> RowStream:
    """The loader as training opens it."""
    source = SourceConfig(name="pictures", path=folder)
    data = DataConfig(sources=(source,), sequence_length=LENGTH, decode_threads=threads, decode_device="cpu", prefetch_rows=4)
    return RowStream([source], data, _shape(), seed=0, global_batch_rows=1, data_rank=0, data_size=1, decode=True, align=1)


def run_loader(folder: Path, num_pictures: int, cores: int) -> float:
    """Seconds for every row once, opening included."""
    start = time.perf_counter()
    stream = open_stream(folder, cores)
    for step in range(num_pictures // PER_ROW):
        stream.step(step)
    seconds = time.perf_counter() - start
    stream.close()
    return seconds


def load_processor() -> Any:
    """Transformers' image processor over torchvision, or None where that is not installed."""
    if not (PARITY / "torchvision").is_dir():
        return None
    sys.path.append(str(PARITY))
    if torch.version.cuda is None:
        # The wheel's compiled part is built for CUDA; its Python part only needs these two declared.
        DECLARED.append(torch.library.Library("torchvision", "DEF"))
        for operator in ("nms", "qnms"):
            DECLARED[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import transformers

    limits = PixelLimits()
    return transformers.Glm4vImageProcessor(size={"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels})


class _Files(torch.utils.data.Dataset[Any]):
    def __init__(self, files: list[Path], processor: Any) -> None:
        self.files, self.processor = files, processor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        with Image.open(self.files[index]) as image:
            return self.processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]


def run_transformers(files: list[Path], processor: Any, cores: int) -> float:
    """Seconds for every picture once, with workers that are there already."""
    loader = torch.utils.data.DataLoader(_Files(files, processor), PER_ROW, num_workers=cores, collate_fn=torch.cat)
    start = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - start


def run_bare(files: list[Path], cores: int) -> float:
    """Seconds to decode and resize, the decoder's way and nothing else."""
    limits = PixelLimits()
    start = time.perf_counter()
    with ndd.EvalContext(num_threads=cores), ndd.EvalMode.sync_full, ThreadPoolExecutor(cores) as pool:
        for first in range(0, len(files), PER_ROW):
            data = [np.fromfile(path, dtype=np.uint8) for path in files[first : first + PER_ROW]]
            decoded = [pixels.torch() for pixels in ndd.decoders.image(ndd.as_batch(data), device="cpu").tensors]
            sizes = [smart_resize(2, int(pixels.shape[0]), int(pixels.shape[1]), limits) for pixels in decoded]
            for _ in pool.map(resize, decoded, sizes):
                pass
    return time.perf_counter() - start


def bytes_a_picture(files: list[Path]) -> dict[str, int]:
    """Mean bytes that the device receives: flat uint8 patches, and what float32 patches would take."""
    limits, total = PixelLimits(), 0
    for path in files:
        with Image.open(path) as image:
            total += image_grid(image.height, image.width, limits).num_patches * 3 * 14 * 14
    return {"loader": total // len(files), "float32": 8 * total // len(files)}


def _median_hidden(folder: Path, num_pictures: int, cores: int, kind: str, rounds: int) -> float:
    return round(statistics.median(hidden_share(folder, num_pictures, cores, kind) for _ in range(rounds)), 2)


def hidden_share(folder: Path, num_pictures: int, cores: int, kind: str) -> float:
    """Of the loading, how much passes during steps as long as itself; `busy core` leaves the loader one core less."""
    threads = cores if kind == "idle core" else max(1, cores - 1)
    rows = num_pictures // PER_ROW
    alone = run_loader(folder, num_pictures, threads)
    step_s = alone / rows
    matrix = torch.randn(256, 256)
    start = time.perf_counter()
    stream = open_stream(folder, threads)
    for step in range(rows):
        stream.step(step)
        end = time.perf_counter() + step_s
        if kind == "idle core":
            time.sleep(step_s)
        while time.perf_counter() < end:
            matrix = (matrix @ matrix).clamp(-1, 1)
    together = time.perf_counter() - start
    stream.close()
    return (alone + step_s * rows - together) / alone


def _shape() -> ModelShape:
    return ModelConfig(preset="digits").shape


if __name__ == "__main__":
    sys.exit(main())
