"""A slice of the 9B on one device: its configuration, its rows, what fits, and one measured run.

The whole vision tower, merger, embedding and head, and as many decoder layers as fit beside them; rows of 8,192 tokens with
photos or of text. `gpu_mfu.py` and `gpu_decode.py` ask for runs; each is a process of its own, so that nothing stays on the
device:

    python benchmarks/gpu_slice.py '{"layers": 4, "recipe": "current"}'     # one run, one JSON line
"""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from megatron_glmv.config.base import validate
from megatron_glmv.config.count import count_parameters
from megatron_glmv.config.model import PRESETS, ModelConfig, ModelShape
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.data.loader import RowStream
from megatron_glmv.data.media import Picture
from megatron_glmv.data.shard_writer import ShardWriter
from megatron_glmv.model.glm4v import build_model
from megatron_glmv.model.inputs import make_inputs
from megatron_glmv.parallel import groups, platform
from megatron_glmv.parallel.mcore import hardware, layer_kind
from megatron_glmv.plan.devices import device_peak, find_hardware
from megatron_glmv.plan.flops import training_flops
from megatron_glmv.plan.memory import stage_memory
from megatron_glmv.plan.rows import RowSample
from megatron_glmv.sequence.grid import PixelLimits, image_grid
from megatron_glmv.sequence.packed import Document, PackedSequence, pack
from megatron_glmv.training.assemble import assemble, assemble_model
from megatron_glmv.training.job import fit_to_device
from megatron_glmv.training.step import StepResult, train_step

ALIGN = 8
"""Documents of a row start at multiples of so many tokens."""
USABLE = 0.95
"""Of the memory, by an estimate that no GPU has confirmed yet."""
FEW_LAYERS = 4
"""With fewer decoder layers than this a slice is a vision tower and little else."""


@dataclass(frozen=True)
class Settings:
    """One run."""

    preset: str = "glm-4.1v-9b"
    layers: int = 4
    """Decoder layers."""
    length: int = 8192
    """Tokens of a row."""
    rows: int = 4
    """Rows, each a micro-batch, of a step."""
    warmup: int = 3
    steps: int = 8
    pictures: bool = True
    """Rows of photos with a paragraph each; else of text."""
    visual: float = 0.6
    """Share of a row's tokens that photos take."""
    pixels: tuple[int, int] = (500, 1200)
    """Least and largest side of a photo."""
    recipe: str = "off"
    """FP8 recipe of both towers."""
    recompute_vision: str = "none"
    decode: str = "memory"
    """memory: the same few rows again and again, decoded before; cpu, gpu: the loader reads and decodes them as it goes."""
    layer_spec: str = "auto"


TINY = Settings("digits", layers=2, length=512, rows=2, warmup=1, steps=2, pixels=(112, 200))
"""A smoke test's, on any device."""


@dataclass(frozen=True)
class Plan:
    """What a run amounts to."""

    parameters: int
    memory_gb: float
    """Of the device, by the planner's estimate; the run reports what torch took of it."""
    row_tflop: float
    """Operations of training on one row, in 1e12."""
    patches: int
    """Of the row."""


def slice_folder(folder: Path, settings: Settings) -> Path:
    """A folder with the config.json of the slice."""
    tree = json.loads((PRESETS / f"{settings.preset}.json").read_text(encoding="utf-8"))
    tree["text_config"]["num_hidden_layers"] = settings.layers
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    return folder


def slice_config(folder: Path, settings: Settings, *, on_gpu: bool) -> TrainConfig:
    """The run's configuration, as a stage file would give it; its rows lie in `folder`/rows."""
    config = validate(TrainConfig, {
        "run_folder": str(folder / "run"), "steps": settings.warmup + settings.steps, "global_batch_rows": settings.rows,
        "model": {"hf_folder": str(slice_folder(folder / "model", settings)), "load_weights": False},
        "precision": {"dtype": "bf16" if on_gpu else "fp32", "layers": settings.layer_spec,
                      **({"fp8_text": settings.recipe, "fp8_vision": settings.recipe} if on_gpu else {})},
        "recompute": {"vision": settings.recompute_vision},
        "optimizer": {"lr": 1e-5},
        "data": {"sequence_length": settings.length, "sources": [{"name": "rows", "path": str(folder / "rows")}],
                 "decode_device": "auto" if settings.decode == "memory" else settings.decode, "decode_threads": 4,
                 "prefetch_rows": 2 * settings.rows},
    })  # fmt: skip
    config.check()
    return config


def photos(number: int, least: int, largest: int) -> Iterator[tuple[bytes, int, int]]:
    """Photo-like JPEGs with their heights and widths: what a camera's noise and edges cost a decoder."""
    rng = np.random.default_rng(0)
    for _ in range(number):
        height, width = (int(side) for side in rng.integers(least, largest, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (height // 24 + 1, width // 24 + 1, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        yield file.getvalue(), height, width


def draw_documents(
    settings: Settings, shape: ModelShape, pictures: list[tuple[bytes, int, int]]
) -> Iterator[tuple[Document, list[Picture]]]:
    """Documents of one row: photos until their share is full, then text; as many as fit."""
    rng = np.random.default_rng(len(pictures))
    ids, limits = shape.tokens, PixelLimits()
    room, visual = settings.length, int(settings.visual * settings.length) if settings.pictures else 0
    for data, height, width in pictures:
        grid = image_grid(height, width, limits)
        words = rng.integers(30, 300, int(rng.integers(60, 200)))
        tokens = np.array([ids.image_start, *[ids.image] * grid.num_tokens(), ids.image_end, *words])
        if grid.num_tokens() > visual or len(tokens) > room:
            continue
        yield Document(tokens, np.ones(len(tokens)), (grid.frame,), f"{len(data)}"), [Picture(data, "jpeg", height, width)]
        room, visual = room - len(tokens), visual - grid.num_tokens()
    while room > 16:
        size = min(room, int(rng.lognormal(6, 0.8)) + 16)
        yield Document(rng.integers(30, 300, size), np.ones(size), (), "text"), []
        room -= size


def row_documents(
    settings: Settings, shape: ModelShape, pictures: list[tuple[bytes, int, int]]
) -> tuple[list[Document], list[list[Picture]]]:
    """Those documents that a row has room for, each at a multiple of 8, with their pictures."""
    drawn = list(draw_documents(settings, shape, pictures))
    ends = np.cumsum([-(-len(document.tokens) // ALIGN) * ALIGN for document, _ in drawn])
    kept = drawn[: int((ends <= settings.length).sum())]
    return [document for document, _ in kept], [media for _, media in kept]


def write_rows(folder: Path, settings: Settings, shape: ModelShape) -> None:
    """Rows as `glmv-data pack` writes them, four times as many as a step takes."""
    ids = shape.tokens
    files = list(photos(24, *settings.pixels)) if settings.pictures else []
    writer = ShardWriter(folder, length=settings.length, align=ALIGN, vocab_size=shape.text.vocab_size, image_token=ids.image,
                         pad_token=ids.pad, image_limits=PixelLimits())  # fmt: skip
    for number in range(4 * settings.rows):
        first = number % max(1, len(files))
        writer.write(*row_documents(settings, shape, files[first:] + files[:first]))
    writer.close()


def plan(settings: Settings, memory_gb: float) -> Plan:
    """Parameters, memory and operations of a run, as `glmv plan` reckons them for a GPU of this size."""
    with tempfile.TemporaryDirectory() as name:
        config = slice_config(Path(name), settings, on_gpu=True)
        shape = config.model.shape
        documents, _ = row_documents(settings, shape, _sizes(settings))
        lengths = [len(document.tokens) for document in documents]
        frames = [frame for document in documents for frame in document.frames]
        patches = [rows * columns for rows, columns in frames]
        trained = sum(document.num_trained for document in documents)
        row = RowSample(
            tokens=np.array([float(sum(lengths))]),
            patches=np.array([float(sum(patches))]),
            trained=np.array([float(trained)]),
            document_tokens=sum(length**2 for length in lengths) / sum(lengths),
            frame_patches=sum(size**2 for size in patches) / max(1, sum(patches)),
            origin="drawn",
        )
        [stage] = stage_memory(config, 1, find_hardware("h100", memory_gb=memory_gb), row)
    return Plan(
        parameters=count_parameters(shape).total,
        memory_gb=stage.total / 1e9,
        row_tflop=training_flops(shape, lengths, frames, trained=trained).total / 1e12,
        patches=sum(patches),
    )


def _sizes(settings: Settings) -> list[tuple[bytes, int, int]]:
    """As `photos` draws them, without the pixels."""
    rng = np.random.default_rng(0)
    drawn = [rng.integers(*settings.pixels, 2) for _ in range(24 if settings.pictures else 0)]
    return [(b"", int(height), int(width)) for height, width in drawn]


def slice_shape(settings: Settings) -> ModelShape:
    """The architecture's numbers with so many decoder layers."""
    shape = ModelConfig(preset=settings.preset).shape
    return shape.model_copy(update={"text": shape.text.model_copy(update={"num_layers": settings.layers})})


def fitting(settings: Settings, memory_gb: float) -> Settings:
    """As many decoder layers as fit the memory; the vision tower is recomputed where only a few would fit without."""
    whole = ModelConfig(preset=settings.preset).shape.text.num_layers
    for recompute, least in (("none", FEW_LAYERS), ("full", 1)):
        for layers in range(whole, least - 1, -1):
            tried = replace(settings, layers=layers, recompute_vision=recompute)
            if plan(tried, memory_gb).memory_gb <= USABLE * memory_gb:
                return tried
    raise SystemExit(f"gpu_slice.py: not one decoder layer fits {memory_gb:.0f} GB beside the vision tower")


def check_on_meta(settings: Settings) -> dict[str, Any]:
    """Build the slice at full width without memory, and run one row through it: parameters and the shape of its logits."""
    shape, meta = slice_shape(settings), torch.device("meta")
    row = draw_row(settings, shape)
    with tempfile.TemporaryDirectory() as name:
        config = slice_config(Path(name), replace(settings, layer_spec="torch", recipe="off"), on_gpu=False)
        groups.initialize(config.parallel, config.seed)
        with mock.patch.object(torch.cuda, "current_device", lambda: meta), mock.patch.object(platform, "device", lambda: meta):
            [model] = build_model(shape, config.parallel, config.precision, config.recompute)
            with torch.no_grad():
                logits = model(make_inputs(row, shape, meta, merged_multiple=16), return_logits=True)
        groups.destroy()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "logits": tuple(logits.shape),
        "device": str(logits.device),
    }


def draw_row(settings: Settings, shape: ModelShape) -> PackedSequence:
    """One row with grey pixels."""
    documents, _ = row_documents(settings, shape, _sizes(settings))
    patches = sum(rows * columns for document in documents for rows, columns in document.frames)
    pixels = torch.full((patches, shape.vision.patch_dim), 128, dtype=torch.uint8) if patches else None
    ids = shape.tokens
    return pack(documents, settings.length, image_token=ids.image, pad_token=ids.pad, align=ALIGN, patches=pixels)


def measure(settings: Settings) -> dict[str, Any]:
    """Train the slice and say how fast; in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = fit_to_device(slice_config(folder, settings, on_gpu=platform.has_cuda()), hardware())
        shape = config.model.shape
        write_rows(folder / "rows", settings, shape)
        groups.initialize(config.parallel, config.seed)
        assembly = assemble(config, assemble_model(config))
        stream = RowStream(config.data.sources, config.data, shape, seed=0, global_batch_rows=settings.rows, data_rank=0,
                           data_size=1, decode=True, align=1)  # fmt: skip
        kept = stream.step(0)
        seconds, waits, results = [], [], []
        for step in range(settings.warmup + settings.steps):
            _synchronize()
            started, waited = time.perf_counter(), stream.wait_s
            batch = kept if settings.decode == "memory" else stream.step(step + 1)
            results.append(train_step(assembly, batch, step))
            _synchronize()
            seconds.append(time.perf_counter() - started)
            waits.append(stream.wait_s - waited)
        stream.close()
        groups.destroy()
    return _report(settings, config, seconds[settings.warmup :], waits[settings.warmup :], results)


def _report(
    settings: Settings, config: TrainConfig, seconds: list[float], waits: list[float], results: list[StepResult]
) -> dict[str, Any]:
    """What a run is reported by; rates are those of its median step."""
    timed, median = results[settings.warmup :], statistics.median(seconds)
    operations = statistics.mean(sum(result.counts.flops.values()) for result in timed)
    peak = device_peak(platform.device_name(), "bf16")
    on_gpu = platform.has_cuda()
    return {
        **asdict(settings),
        "device": platform.device_name(),
        "layer_kind": layer_kind(config.precision),
        "precision": config.precision.dtype if config.precision.fp8_text == "off" else f"fp8 {config.precision.fp8_text}",
        "seconds": median,
        "tokens_s": statistics.mean(result.counts.useful_tokens for result in timed) / median,
        "pictures_s": statistics.mean(result.counts.images for result in timed) / median,
        "tflop_s": operations / median / 1e12,
        "mfu": operations / median / peak if peak else None,
        "wait_share": sum(waits) / sum(seconds),
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "losses": [round(result.loss, 4) for result in results],
    }


def _synchronize() -> None:
    if platform.has_cuda():
        torch.cuda.synchronize()


def run(settings: Settings, timeout_s: float = 300.0) -> dict[str, Any]:
    """`measure` in a process of its own.

    Returns:
        What it reports, or {"error": its last line} where it failed.
    """
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(asdict(settings))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"longer than {timeout_s:g} s"}
    sys.stderr.write("".join(f"{line}\n" for line in done.stderr.splitlines() if line.startswith("glmv: ")))
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def device_memory_gb() -> float:
    """Of the CUDA device; where there is none, of the one that the plans are made for."""
    return torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 85.0


def settings_of(tree: dict[str, Any]) -> Settings:
    """From JSON."""
    return Settings(**{**tree, "pixels": tuple(tree.get("pixels", Settings.pixels))})


if __name__ == "__main__":
    platform.activate()
    print(json.dumps(measure(settings_of(json.loads(sys.argv[1])))))
