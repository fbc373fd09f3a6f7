"""A folder that is complete or absent: written under another name, and given its own when everything in it is on the disk."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_glmv.config.weight_map import MappingError
from megatron_glmv.run_folder.checkpoint_folder import PARTIAL, sync


@contextlib.contextmanager
def new_folder(folder: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Make `folder` out of what the block writes into the folder that it gets.

    Args:
        folder: must not exist; what an interrupted attempt left beside it is replaced.
        needed_bytes: what the block is going to write, to say before anything is written that the disk is too small.

    Raises:
        MappingError: `folder` exists, or the disk is full or refuses; nothing is left then, whatever ended the block.
    """
    if folder.exists():
        raise MappingError(f"{folder}: exists already; remove it or choose another folder")
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < needed_bytes:
            raise MappingError(f"{folder}: needs {needed_bytes / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free")
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise MappingError(f"{folder}: cannot be written ({error.strerror}); nothing of it was left") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
