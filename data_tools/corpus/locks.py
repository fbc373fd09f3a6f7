"""Who works in a job's folder: locks that the system takes back when their process ends, however it ends.

They are flocks, which hold between machines where the file system shares them (NFS, Lustre with `-o flock`).
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.corpus.reader import CorpusError


@contextmanager
def wait_turn(path: Path) -> Iterator[None]:
    """Hold the lock file, made where it is missing, as soon as no other process does."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def claim(path: Path, work: str) -> Iterator[None]:
    """Hold the lock file, or refuse at once.

    Args:
        path: of the lock file, made where it is missing; names its holder for those who are refused.
        work: what the lock stands for, in words.

    Raises:
        CorpusError: another process holds it.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise CorpusError(
                f"{path.parent}: {work} is being done by {holder}; wait until that ends or stop it, then run the command again"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
