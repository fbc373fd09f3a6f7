"""What disks, Megatron and torch raise when a checkpoint cannot be written or read, as the one line that a user gets."""

from __future__ import annotations

from pathlib import Path

from megatron.core.dist_checkpointing.mapping import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_glmv.run_folder.checkpoint_folder import CheckpointError

FAILURES = (OSError, RuntimeError, ValueError, KeyError, EOFError, CheckpointException, CheckpointingException)


def unwritable(folder: Path, error: BaseException) -> CheckpointError:
    """A save that has failed."""
    return CheckpointError(f"{folder}: could not be written ({cause(error)}); older checkpoints are untouched")


def unreadable(folder: Path, error: BaseException) -> CheckpointError:
    """A complete checkpoint that does not load."""
    return CheckpointError(f"{folder}: could not be read ({cause(error)}); remove the folder to resume from the one before it")


def cause(error: BaseException) -> str:
    """The innermost reason in one line: Megatron and torch wrap the disk's own error several times."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
