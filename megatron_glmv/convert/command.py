"""`glmv import`, `glmv export`, `glmv verify`: from a Hugging Face folder to a checkpoint and back, with the proof."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from megatron_glmv.config.weight_map import MappingError
from megatron_glmv.convert.checkpoint_import import import_folder
from megatron_glmv.convert.checkpoint_tensors import Stored
from megatron_glmv.convert.hf_export import export_checkpoint
from megatron_glmv.convert.lora import open_weights
from megatron_glmv.convert.peft_export import export_adapters
from megatron_glmv.convert.processor import find_processor
from megatron_glmv.convert.verify import PARITY, Parity, compare
from megatron_glmv.run_folder.checkpoint_folder import find, read_manifest, shape_of

OK, FAILED = 0, 1


def run_import(hf_folder: Path, checkpoint: Path, *, verify: bool = True) -> int:
    """Write a Hugging Face folder as a checkpoint and print what was written.

    Args:
        hf_folder: a released or exported folder.
        checkpoint: folder to write; must not exist.
        verify: prove it before it gets its name, and leave the proof in it.

    Returns:
        Exit code 0.

    Raises:
        InputError: one line that names the file, folder or tensor at fault; nothing is left then.
    """
    started = time.monotonic()
    with _bytes_bar("import") as progress:
        check = (lambda partial: _prove(hf_folder, partial, _tensors(partial), partial)) if verify else None
        report = import_folder(hf_folder, checkpoint, check=check, progress=progress)
    _say(report.folder, report.num_tensors, report.num_parameters, report.dtype, hf_folder, started)
    return OK


def run_export(
    checkpoint: Path,
    hf_folder: Path,
    *,
    processor: Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    verify: bool = True,
) -> int:
    """Write a checkpoint as a Hugging Face folder and print what was written.

    Args:
        checkpoint: one complete checkpoint, or a run's folder: its newest one.
        hf_folder: folder to write; must not exist.
        processor: folder with tokenizer, chat template and image limits; None: where the checkpoint says it came from.
        max_shard_bytes: largest safetensors file.
        verify: prove it before it gets its name, and leave the proof in it.

    Returns:
        Exit code 0.

    Raises:
        InputError: one line that names the file, folder or tensor at fault; nothing is left then.
    """
    started = time.monotonic()
    source = find(checkpoint)
    with _bytes_bar("export") as progress:
        report = export_checkpoint(
            source,
            hf_folder,
            processor or find_processor(source),
            max_shard_bytes=max_shard_bytes,
            check=(lambda partial, stored: _prove(partial, source, stored, partial)) if verify else None,
            progress=progress,
        )
    _say(report.folder, report.num_tensors, report.num_parameters, report.dtype, source, started)
    return OK


def run_adapter(checkpoint: Path, folder: Path) -> int:
    """Export the adapters alone, as a PEFT folder, and print what was written.

    Args:
        checkpoint: one complete checkpoint, or a run's folder: its newest one.
        folder: PEFT folder to write; must not exist.

    Returns:
        Exit code 0.

    Raises:
        InputError: one line that names the file, folder or tensor at fault; nothing is left then.
    """
    source = find(checkpoint)
    report = export_adapters(source, folder, shape_of(source, read_manifest(source)))
    print(
        f"{report.folder}: {report.num_adapters} adapters, {report.num_parameters:,} parameters in {report.dtype} from {source}"
    )
    return OK


def run_verify(hf_folder: Path, checkpoint: Path, report: Path | None = None) -> int:
    """Compare a Hugging Face folder with a checkpoint and print what was found.

    Args:
        hf_folder: a released or exported folder.
        checkpoint: one complete checkpoint, or a run's folder: its newest one.
        report: file to write the comparison to, as JSON.

    Returns:
        Exit code: 0 one model, 1 not.

    Raises:
        InputError: one of the two cannot be read, or they are not of one architecture.
    """
    source = find(checkpoint)
    parity = _compare(hf_folder, source, _tensors(source))
    if report is not None:
        parity.write(report)
    print("\n".join(parity.lines()))
    return FAILED if parity.failure else OK


def _prove(hf_folder: Path, checkpoint: Path, stored: Stored, folder: Path) -> None:
    """Compare the two, leave the proof in `folder`, and refuse what is not one model."""
    parity = _compare(hf_folder, checkpoint, stored)
    print("\n".join(parity.lines()), file=sys.stderr)
    if parity.failure:
        raise MappingError(f"the written folder is not the model that was read: {parity.failure}")
    parity.write(folder / PARITY)


def _compare(hf_folder: Path, checkpoint: Path, stored: Stored) -> Parity:
    bars: dict[str, tqdm[object]] = {}

    def progress(what: str, share: float) -> None:
        if what not in bars:
            bars[what] = tqdm(total=100, desc=f"verify: {what}", unit="%", disable=None, bar_format="{l_bar}{bar}| {elapsed}")
        bars[what].update(100 * share)

    try:
        return compare(hf_folder, checkpoint, stored, progress)
    finally:
        for bar in bars.values():
            bar.close()


@contextlib.contextmanager
def _bytes_bar(name: str) -> Iterator[Callable[[int], object]]:
    """A progress bar of bytes, on a terminal."""
    with tqdm(desc=name, unit="B", unit_scale=True, disable=None) as bar:
        yield bar.update


def _tensors(checkpoint: Path) -> Stored:
    return open_weights(checkpoint, shape_of(checkpoint, read_manifest(checkpoint)))


def _say(folder: Path, num_tensors: int, num_parameters: int, dtype: str, source: Path, started: float) -> None:
    print(
        f"{folder}: {num_tensors} tensors, {num_parameters:,} parameters in {dtype} from {source} "
        f"in {time.monotonic() - started:.1f} s"
    )
