"""Writes the files of one checkpoint, in the background if wanted, from a thread of the training process.

Megatron's own writer forks the training process for every save and keeps a queue in a server process that outlives a killed
rank. A fork of a process with CUDA, DALI and gloo threads can stop in a lock that no thread holds any more, and a dead worker
is waited for without end. The same write functions called in a thread have none of this; torch releases the interpreter
while it writes. The thread waits for the disk every so many bytes, so that a save that goes on is told from one that hangs.

Source: megatron-core 0.16.1, dist_checkpointing/strategies/{async_utils,filesystem_async}.py.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_glmv.run_folder.checkpoint_sums import Sums, sum_file
from megatron_glmv.training.checkpoint_ranks import wait_for_all

Bucket = tuple[str, str, tuple[list[Any], list[Any]]]
"""File path, name inside the checkpoint, (byte items, tensor items) to write there; Megatron's WriteBucket."""

# Megatron takes the write results of this process from here; set before its first save, no server process is started.
filesystem_async._results_queue = queue.Queue()
_SYNC_BYTES = 256 * 2**20
_thread = threading.local()


def _sync_between(write_item: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's function that writes one tensor, after which the disk may have to take what was written."""

    @functools.wraps(write_item)
    def write(*args: Any, **named: Any) -> Any:
        written = write_item(*args, **named)
        if (save := getattr(_thread, "write", None)) is not None:
            save.sync(args[-4])  # (..., stream, tensor, item, key)
        return written

    return write


filesystem_async._write_item = _sync_between(filesystem_async._write_item)


class CheckpointWrite:
    """One save under way on this rank.

    Args:
        request: what ``dist_checkpointing.save(..., async_sharded_save=True)`` returned.
        background: training goes on meanwhile, so copies of the tensors are written.
    """

    def __init__(self, request: AsyncRequest, background: bool) -> None:
        self._finalizers = request.finalize_fns
        self._thread: threading.Thread | None = None
        self.sums: Sums = {}
        """Of the files that this rank has written."""
        self._num_blocks = self._synced = 0
        if request.async_fn is None:
            return
        transforms = request.async_fn.args[0]
        buckets: list[Bucket] = request.preload_fn()
        results = request.async_fn_args[2]
        # On CUDA the staged tensors are copies already; on the CPU they are the parameters that the next step changes.
        if background and not torch.cuda.is_available():
            buckets = [(path, name, (data, [(item, t.clone()) for item, t in ts])) for path, name, (data, ts) in buckets]
        self._thread = threading.Thread(target=self._write, args=(transforms, buckets, results), name="checkpoint", daemon=True)
        self._thread.start()

    def is_written(self) -> bool:
        """Whether this rank's files are on the disk, or have failed to be."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for all ranks' files, then exchange the results and write the index; every rank must call it.

        Raises:
            CheckpointException: a file could not be written on some rank; raised on all ranks.
        """
        wait_for_all(self._thread, lambda: self._num_blocks)
        for finalize in self._finalizers:
            finalize()

    def _write(self, transforms: list[Any], buckets: list[Bucket], results: queue.Queue[Any]) -> None:
        """Write every bucket, read it back for its checksum, and report the results or the first failure."""
        _thread.write = self
        outcome = self._write_all(transforms, buckets)
        paths = sorted({str(bucket[0]) for bucket in buckets})
        try:
            self.sums = {Path(path).name: sum_file(Path(path), self._count_block) for path in paths}
        except OSError as error:
            outcome = outcome if isinstance(outcome, Exception) else error
        results.put(outcome)

    def _write_all(self, transforms: list[Any], buckets: list[Bucket]) -> Any:
        """Write every bucket; returns all results or the first failure."""
        written: dict[int, Any] = {}
        write = filesystem_async.FileSystemWriterAsync.write_preloaded_data
        for index, bucket in enumerate(buckets):
            answer: queue.Queue[Any] = queue.Queue()
            done: queue.Queue[int] = queue.Queue()
            done.put(index)
            self._synced = 0
            try:
                write(transforms, index, bucket, answer, done, use_fsync=True)
                outcome = answer.get_nowait()[1]
            except Exception as error:  # noqa: BLE001 - whatever it is, all ranks must hear of it
                outcome = error
            if isinstance(outcome, Exception):
                return outcome
            written[index] = outcome
            self._count_block()
        return written

    def sync(self, stream: BinaryIO) -> None:
        """Wait for the disk, if much of a file has been written since the last time."""
        if (end := stream.tell()) - self._synced >= _SYNC_BYTES:
            stream.flush()
            os.fdatasync(stream.fileno())
            self._synced = end
            self._count_block()

    def _count_block(self) -> None:
        self._num_blocks += 1
