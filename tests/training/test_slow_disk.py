"""A disk that is slow and one that hangs, on one of two real ranks: the watchdog lets the first one be, and ends the second."""

from __future__ import annotations

import concurrent.futures
import functools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_glmv.run_folder import checkpoint_sums
from megatron_glmv.training.state import TrainState
from megatron_glmv.training.watchdog import EXIT_CODE, Watchdog
from tests.ranks import Outcome, watch_ranks

TIMEOUT_S, SLOW = 4.0, 1
FAULTS = ("slow to write", "slow to read", "hangs")


def run(rank: int, folder: str, fault: str) -> float:
    """Save, and resume from that; returns the seconds of what was slow."""
    from megatron_glmv.parallel import platform

    platform.activate()
    from megatron_glmv.training.checkpoint import Checkpointer
    from tests.training.stock_gpt import Trainer, make_config

    trainer = Trainer.build(make_config(Path(folder), {}))
    checkpointer = Checkpointer(trainer.config, trainer.chunks, trainer.optimizer)
    if rank == SLOW and fault != "slow to read":
        slow_down_writes([0.3] * 30 if fault == "slow to write" else [600.0])
    watchdog = Watchdog(Path(folder), rank, 2, TIMEOUT_S)
    watchdog.start()
    watchdog.beat(1, "checkpoint")
    began = time.monotonic()
    checkpointer.save(TrainState(step=1))
    seconds = time.monotonic() - began
    if fault == "slow to read":
        if rank == SLOW:
            slow_down_sums()
        began = time.monotonic()
        checkpointer.load_latest()
        seconds = time.monotonic() - began
    watchdog.stop()
    return seconds


def slow_down_writes(delays: list[float]) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    write_item, left = filesystem_async._write_item, iter(delays)

    @functools.wraps(write_item)  # Megatron looks at its signature
    def slow(*words: Any, **named: Any) -> Any:
        written = write_item(*words, **named)
        words[-4].flush()  # (..., stream, tensor, item, key)
        time.sleep(next(left, 0.0))
        return written

    filesystem_async._write_item = slow


def slow_down_sums() -> None:
    crc32, delays = checkpoint_sums.zlib.crc32, iter([0.3] * 30)

    def slow(*words: Any) -> int:
        time.sleep(next(delays, 0.0))
        return crc32(*words)

    checkpoint_sums._BLOCK_BYTES = 256
    checkpoint_sums.zlib = SimpleNamespace(crc32=slow)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = {fault: pool.submit(watch_ranks, run, 2, str(tmp_path_factory.mktemp("run")), fault) for fault in FAULTS}
    return {fault: found.result() for fault, found in runs.items()}


@pytest.mark.parametrize("fault", ["slow to write", "slow to read"])
def test_a_slow_disk_is_waited_for(endings: dict[str, list[Outcome]], fault: str) -> None:
    """Twice as long as the watchdog would wait for a rank that stands still; the other rank waits for this one."""
    for rank in endings[fault]:
        assert rank.exit_code == 0 and rank.result > 2 * TIMEOUT_S, rank.output


def test_a_disk_that_hangs_is_not(endings: dict[str, list[Outcome]]) -> None:
    """The rank that waits may lose its peer before its own time is up."""
    codes = {rank.exit_code for rank in endings["hangs"]}
    assert EXIT_CODE in codes <= {EXIT_CODE, 1}
    assert "no progress for 4 s: " in "".join(rank.output for rank in endings["hangs"])
