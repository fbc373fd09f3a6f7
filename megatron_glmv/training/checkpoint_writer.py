"""Writes the files of one checkpoint, in the background if wanted, from a thread of the training process.

Megatron's own writer forks the training process for every save and keeps a queue in a server process that outlives a killed
rank. A fork of a process with CUDA, DALI and gloo threads can stop in a lock that no thread holds any more, and a dead worker
is waited for without end. The same write functions called in a thread have none of this; torch releases the interpreter
while it writes. A save that goes on is told from one that hangs by what its files have grown.

Source: megatron-core 0.16.1, dist_checkpointing/strategies/{async_utils,filesystem_async}.py.
"""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_glmv.run_folder.checkpoint_sums import Sums, sum_file
from megatron_glmv.training.checkpoint_ranks import wait_for_all

Bucket = tuple[str, str, tuple[list[Any], list[Any]]]
"""File path, name inside the checkpoint, (byte items, tensor items) to write there; Megatron's WriteBucket."""

# Megatron takes the write results of this process from here; set before its first save, no server process is started.
filesystem_async._results_queue = queue.Queue()


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
        self._num_blocks = 0
        self._paths: list[Path] = []
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
        wait_for_all(self._thread, self._progress)
        for finalize in self._finalizers:
            finalize()

    def _write(self, transforms: list[Any], buckets: list[Bucket], results: queue.Queue[Any]) -> None:
        """Write every bucket, read it back for its checksum, and report the results or the first failure."""
        self._paths = [Path(path) for path in sorted({str(bucket[0]) for bucket in buckets})]
        outcome = self._write_all(transforms, buckets)
        try:
            self.sums = {path.name: sum_file(path, self._count_block) for path in self._paths}
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
            try:
                write(transforms, index, bucket, answer, done, use_fsync=True)
                outcome = answer.get_nowait()[1]
            except Exception as error:  # noqa: BLE001 - whatever it is, all ranks must hear of it
                outcome = error
            if isinstance(outcome, Exception):
                return outcome
            written[index] = outcome
        return written

    def _progress(self) -> int:
        """Bytes that lie in this rank's files, and blocks of them that were read back."""
        return self._num_blocks + sum(path.stat().st_size for path in self._paths if path.exists())

    def _count_block(self) -> None:
        self._num_blocks += 1
