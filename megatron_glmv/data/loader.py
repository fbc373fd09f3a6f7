"""`RowStream`: the rows of each step for one replica, read and decoded ahead by one background thread.

The order is a pure function of seed and step, so the step number is the whole state: a stream that starts at a later step, or
with another number of replicas, gives the very same rows. All of DALI is used in the one thread, which is joined before the
interpreter ends, because a thread still inside DALI at that moment aborts the process.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_glmv.config.base import InputError
from megatron_glmv.config.data import DataConfig, SourceConfig
from megatron_glmv.config.model import ModelShape
from megatron_glmv.data.index import check_compatible
from megatron_glmv.data.order import Draw, GlobalOrder
from megatron_glmv.data.row_media import BadDocument, MediaDecoder, moving_frames
from megatron_glmv.data.shard_reader import ShardReader, StoredRow
from megatron_glmv.sequence.cost import CostModel, cost_model
from megatron_glmv.sequence.packed import PackedSequence, pack

FREE_FAULTS = 10
"""Bad samples that never stop a run, however few were read."""

_BuiltRow = tuple[PackedSequence, tuple[BadDocument, ...]]


class DataError(InputError):
    """The data are too damaged to go on; the message names the count and the log."""


@dataclass(frozen=True)
class Fault:
    """A sample with a picture or video that does not decode; its patches are grey and its tokens must not be trained.

    Attributes:
        row: index into StepRows.rows.
        document: index into that row's documents.
        key: name of the sample.
        reason: what is wrong with which picture or video.
    """

    row: int
    document: int
    key: str
    reason: str


@dataclass(frozen=True)
class StepRows:
    """One replica's rows of one step.

    Attributes:
        rows: micro-batches in order; patches are flat uint8 where media are decoded, else None.
        faults: samples to mask; only a decoding rank knows them.
    """

    rows: tuple[PackedSequence, ...]
    faults: tuple[Fault, ...]


class RowStream:
    """The rows of each step for one data-parallel replica."""

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        data: DataConfig,
        shape: ModelShape,
        *,
        seed: int,
        global_batch_rows: int,
        data_rank: int,
        data_size: int,
        decode: bool,
        align: int,
        first_step: int = 0,
        shuffle: bool | None = None,
        fault_log: Path | None = None,
    ) -> None:
        """Open the sources and start to read ahead.

        Args:
            sources: data.sources or data.eval_sources.
            data: row length, prefetch depth, decoding device, tolerated share of bad samples.
            shape: the model's numbers.
            seed: of the run; with the step it decides the order.
            global_batch_rows: rows of one step over all replicas.
            data_rank: this replica.
            data_size: replicas.
            decode: read and decode pictures and videos; false on ranks that do not run the vision tower.
            align: what the layout needs documents to be multiples of, 2 x context; the data sets must have been packed so.
            first_step: the step that will be asked for first.
            shuffle: overrides data.shuffle; evaluation reads in order.
            fault_log: JSONL file that gets a line for every bad sample, once in the life of the stream.

        Raises:
            ShardError: a source that is incomplete, damaged, or packed for another model or layout.
            ValueError: the global batch does not divide by the replicas.
        """
        readers = []
        for source in sources:
            reader = ShardReader(source.path)
            where = f"source {source.name!r} ({source.path})"
            check_compatible(reader.index, where, shape, sequence_length=data.sequence_length, align=align)
            readers.append(reader)
        order = GlobalOrder(
            [source.name for source in sources],
            [source.weight for source in sources],
            [len(reader) for reader in readers],
            seed=seed,
            global_batch_rows=global_batch_rows,
            shuffle=data.shuffle if shuffle is None else shuffle,
            cost_of=_row_costs(readers, cost_model(shape), data.sequence_length) if data.even_ranks else None,
        )
        order.step(first_step, data_rank, data_size)
        decoder = None
        if decode:
            on_gpu = data.decode_device == "gpu" or (data.decode_device == "auto" and torch.cuda.is_available())
            decoder = MediaDecoder(shape.vision, "gpu" if on_gpu else "cpu", data.decode_threads)
        self.order = order.description
        """What the order of the rows depends on, as JSON."""
        self._builder = _RowBuilder(sources, readers, order, data, shape, decoder, fault_log)
        self._replica = (data_rank, data_size)
        self._rows_per_step = global_batch_rows // data_size
        self._depth = data.prefetch_rows
        self._wait_s = 0.0
        self._closed = False
        self._next_step: int | None
        self._ahead: _ReadAhead
        self._stop: weakref.finalize
        self._start(first_step)

    def step(self, step: int) -> StepRows:
        """The rows of `step`. Steps that follow each other are prefetched; any other step restarts the prefetch there.

        Raises:
            DataError: too many samples cannot be decoded.
            ShardError: a shard changed or cannot be read any more.
            RowError: a row contradicts itself.
            ValueError: the stream is closed.
        """
        if self._closed:
            raise ValueError("this stream of rows is closed")
        if step != self._next_step:
            self._stop()
            self._start(step)
        self._next_step = None
        start = time.perf_counter()
        built = [self._ahead.take() for _ in range(self._rows_per_step)]
        self._wait_s += time.perf_counter() - start
        self._next_step = step + 1
        faults = tuple(
            Fault(index, bad.document, bad.key, bad.reason) for index, (_, row_faults) in enumerate(built) for bad in row_faults
        )
        return StepRows(tuple(row for row, _ in built), faults)

    def close(self) -> None:
        """Stop and join the thread and close the shards; also done when the stream is dropped and at interpreter exit."""
        self._closed = True
        self._stop()
        self._builder.close()

    @property
    def wait_s(self) -> float:
        """Seconds that `step` has waited for rows so far."""
        return self._wait_s

    def _start(self, step: int) -> None:
        self._next_step = step
        self._ahead = _ReadAhead(self._builder.rows_from(step, *self._replica), self._depth)
        self._stop = weakref.finalize(self, self._ahead.close)


def _row_costs(readers: Sequence[ShardReader], model: CostModel, length: int) -> Callable[[Draw], float]:
    """What training on a row costs, in tokens: every row its length, padding included, and what it has beyond."""

    def cost(draw: Draw) -> float:
        row = readers[draw.source].measures(draw.row)
        names = ("tokens", "trained", "squared_tokens", "patches", "squared_patches")
        return model.row(length, *(row[name] for name in names))

    return cost


class _ReadAhead:
    """A thread that pulls items from an iterator into a bounded buffer."""

    def __init__(self, items: Iterator[_BuiltRow], depth: int) -> None:
        self._items, self._depth = items, depth
        self._buffer: deque[_BuiltRow] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._error: BaseException | None = None
        # A daemon, because the interpreter joins other threads before it runs the finalizer that stops this one.
        self._thread = threading.Thread(target=self._run, name="rows", daemon=True)
        self._thread.start()

    def take(self) -> _BuiltRow:
        """The next row; waits for it, and raises what the thread met in its place."""
        with self._changed:
            self._changed.wait_for(lambda: self._buffer or self._error)
            if not self._buffer:
                assert self._error is not None
                raise self._error
            self._changed.notify_all()
            return self._buffer.popleft()

    def close(self) -> None:
        """End the thread, which finishes the row that it is at."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    self._buffer.append(item)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: len(self._buffer) < self._depth or self._stopped)
                    if self._stopped:
                        return
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that asks for rows
            with self._changed:
                self._error = error
                self._changed.notify_all()


class _RowBuilder:
    """From a draw to a packed row; used by the background thread only."""

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        readers: Sequence[ShardReader],
        order: GlobalOrder,
        data: DataConfig,
        shape: ModelShape,
        decoder: MediaDecoder | None,
        fault_log: Path | None,
    ) -> None:
        self._names = [source.name for source in sources]
        self._readers, self._order, self._decoder = readers, order, decoder
        self._length, self._shape = data.sequence_length, shape
        self._max_bad_share, self._fault_log = data.max_bad_share, fault_log
        self._logged: set[tuple[str, str]] = set()
        self._num_samples = self._num_bad = 0

    def rows_from(self, step: int, data_rank: int, data_size: int) -> Iterator[_BuiltRow]:
        """This replica's rows from `step` on, without end."""
        while True:
            for draw in self._order.step(step, data_rank, data_size):
                yield self._build(step, draw)
            step += 1

    def close(self) -> None:
        """Close the shards and end the decoder's threads."""
        for reader in self._readers:
            reader.close()
        if self._decoder is not None:
            self._decoder.close()

    def _build(self, step: int, draw: Draw) -> _BuiltRow:
        reader = self._readers[draw.source]
        stored = reader.read(draw.row, media=self._decoder is not None)
        patches, faults = self._decoder.decode(stored) if self._decoder is not None else (None, ())
        row = pack(
            stored.documents,
            self._length,
            image_token=self._shape.tokens.image,
            pad_token=self._shape.tokens.pad,
            align=reader.index.align,  # of the data set, not of the layout: every layout gets the same row
            merge=self._shape.vision.spatial_merge_size,
            patches=patches,
            moving=moving_frames(stored),
            key=f"{self._names[draw.source]}/{stored.key}",
        )
        self._judge(step, draw, stored, faults)
        return row, faults

    def _judge(self, step: int, draw: Draw, stored: StoredRow, faults: Sequence[BadDocument]) -> None:
        """Log bad samples, and stop the run when there are too many of them."""
        source = self._names[draw.source]
        for bad in faults:
            if self._fault_log is not None and (source, bad.key) not in self._logged:
                self._logged.add((source, bad.key))
                line = {"step": step, "source": source, "row": stored.key, "sample": bad.key, "reason": bad.reason}
                self._fault_log.parent.mkdir(parents=True, exist_ok=True)
                with self._fault_log.open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
        self._num_samples += len(stored.documents)
        self._num_bad += len(faults)
        if faults and self._num_bad > max(FREE_FAULTS, self._max_bad_share * self._num_samples):
            named = f"they are listed in {self._fault_log}" if self._fault_log else f"the last is sample {faults[-1].key!r}"
            raise DataError(
                f"{self._num_bad} of {self._num_samples} samples have pictures or videos that do not decode, more than "
                f"data.max_bad_share {self._max_bad_share} allows; {named}; repair them or raise the share"
            )
