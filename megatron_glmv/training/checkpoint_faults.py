"""What disks, Megatron and torch raise when a checkpoint cannot be written or read, as the one line that a user gets."""

from __future__ import annotations

import socket
from pathlib import Path

from megatron.core.dist_checkpointing.mapping import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_glmv.run_folder.checkpoint_folder import CheckpointError, DiskError

FAILURES = (OSError, RuntimeError, ValueError, KeyError, EOFError, CheckpointException, CheckpointingException)


def unwritable(folder: Path, error: BaseException) -> CheckpointError:
    """A save that has failed."""
    return CheckpointError(f"{folder}: could not be written ({cause(error)}); older checkpoints are untouched")


def unreadable(folder: Path, error: BaseException) -> CheckpointError | DiskError:
    """A complete checkpoint that does not load: the disk does not answer, or what it holds is of no use."""
    if isinstance(_innermost(error), OSError):
        return DiskError(f"{folder}: could not be read on {socket.gethostname()} ({cause(error)})")
    return CheckpointError(f"{folder}: could not be read ({cause(error)}); rename the folder to resume from the one before it")


def cause(error: BaseException) -> str:
    """The innermost reason in one line: Megatron and torch wrap the disk's own error several times."""
    reason = _innermost(error)
    return " ".join(str(reason).split())[:300] or type(reason).__name__


def _innermost(error: BaseException) -> BaseException:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    return error
