"""`glmv export`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import re
import time
from pathlib import Path

from megatron_glmv.convert.hf_export import checkpoint_shape, export_checkpoint
from megatron_glmv.convert.mapping import MappingError
from megatron_glmv.convert.peft_export import export_adapters


def run(checkpoint: Path, folder: Path, processor: Path) -> int:
    """Export and print what was written.

    Args:
        checkpoint: one complete checkpoint, or a run's folder: its newest one.
        folder: Hugging Face folder to write; must not exist.
        processor: folder with tokenizer, chat template and image limits.

    Returns:
        Exit code 0.

    Raises:
        MappingError: one line that names the file, folder or tensor at fault.
    """
    started = time.monotonic()
    source = newest_checkpoint(checkpoint)
    report = export_checkpoint(source, folder, processor)
    print(
        f"{report.folder}: {report.num_tensors} tensors, {report.num_parameters:,} parameters in {report.dtype} from {source} "
        f"in {time.monotonic() - started:.1f} s"
    )
    return 0


def run_adapter(checkpoint: Path, folder: Path) -> int:
    """Export the adapters alone, as a PEFT folder, and print what was written.

    Args:
        checkpoint: one complete checkpoint, or a run's folder: its newest one.
        folder: PEFT folder to write; must not exist.

    Returns:
        Exit code 0.

    Raises:
        MappingError: one line that names the file, folder or tensor at fault.
    """
    source = newest_checkpoint(checkpoint)
    report = export_adapters(source, folder, checkpoint_shape(source))
    print(
        f"{report.folder}: {report.num_adapters} adapters, {report.num_parameters:,} parameters in {report.dtype} from {source}"
    )
    return 0


def newest_checkpoint(path: Path) -> Path:
    """A checkpoint's own folder, or the newest complete one of a run's folder; its manifest is written last.

    Raises:
        MappingError: there is none.
    """
    if (path / "meta.json").is_file():
        return path
    folders = [found.parent for found in path.glob("checkpoints/step_*/meta.json")]
    complete = {int(match[1]): found for found in folders if (match := re.fullmatch(r"step_(\d+)", found.name))}
    if not complete:
        raise MappingError(f"{path}: holds no complete checkpoint; name a run's folder or one step_... folder of it")
    return complete[max(complete)]
