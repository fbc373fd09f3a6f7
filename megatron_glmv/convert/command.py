"""`glmv export`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_glmv.convert.checkpoint_tensors import newest_checkpoint
from megatron_glmv.convert.hf_export import export_checkpoint
from megatron_glmv.convert.processor import find_processor


def run(checkpoint: Path, folder: Path, processor: Path | None = None) -> int:
    """Export and print what was written.

    Args:
        checkpoint: one complete checkpoint, or a run's folder: its newest one.
        folder: Hugging Face folder to write; must not exist.
        processor: folder with tokenizer, chat template and image limits; None: the one the checkpoint was trained with.

    Returns:
        Exit code 0.

    Raises:
        InputError: one line that names the file, folder or tensor at fault.
    """
    started = time.monotonic()
    source = newest_checkpoint(checkpoint)
    report = export_checkpoint(source, folder, processor or find_processor(source))
    print(
        f"{report.folder}: {report.num_tensors} tensors, {report.num_parameters:,} parameters in {report.dtype} from {source} "
        f"in {time.monotonic() - started:.1f} s"
    )
    return 0
