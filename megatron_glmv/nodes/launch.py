"""Start ranks on this machine, as torchrun does, and end with their exit code instead of a page of tracebacks."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_glmv.run_folder.launch import mark_launch
from megatron_glmv.run_folder.stop_file import STOP_FILE

_ENDING = "SIGINT,SIGHUP,SIGQUIT"
"""Signals that torch's agent takes as its end; SIGTERM and SIGUSR1 are requests to the ranks."""


def start_ranks(num_ranks: int, arguments: Sequence[str], run_folder: Path, max_restarts: int = 0) -> int:
    """Run ``python -m megatron_glmv ARGUMENTS`` in `num_ranks` processes; when one fails, the others are ended.

    SIGTERM and SIGUSR1 to this process ask the ranks to save and end, by the file in their run folder, which also those find
    that are only starting, or start again. A second SIGTERM ends them at once.

    Args:
        num_ranks: processes.
        arguments: after the program's name.
        run_folder: of the run; a rank that is killed is looked up in its ranks/ for where it was.
        max_restarts: times that all ranks are started again, to go on from the newest checkpoint, before that is a failure.

    Returns:
        0 when all ranks succeeded, or have stopped on request; the exit code of the first that failed; 128 and the signal's
        number when a signal has ended them.
    """
    mark_launch()
    _pass_on_requests(run_folder)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    # The ranks meet at this process's store, which listens already: the port of one that rank 0 opens seconds later may be gone
    # by then. Each start has its own part of it (`groups.initialize`).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "0"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=max_restarts,
        signals_to_handle=_ENDING,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "megatron_glmv", *arguments)
    except SignalException as error:
        number = signal.SIGTERM if error.sigval == signal.SIGKILL else error.sigval
        said = f"ranks ended by {number.name}; the next start goes on from the newest checkpoint"
        print(f"glmv: error: {said}", file=sys.stderr, flush=True)
        return 128 + number
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode  # the rank has said why
        place = _last_place(run_folder, rank)
        print(f"glmv: error: rank {rank} was killed by signal {-failure.exitcode} {place}", file=sys.stderr, flush=True)
        return 1
    return 0


def _pass_on_requests(run_folder: Path) -> None:
    """Take signals as requests to the ranks from here on."""
    asked: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM in asked:
            raise SignalException("asked twice", signal.SIGKILL)  # to the ranks, for which SIGTERM is a request
        asked.append(number)
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
            (run_folder / STOP_FILE).touch()
            said = f"{signal.Signals(number).name}: the ranks save and end after their step; a second SIGTERM ends them now"
        except OSError as error:
            said = f"{run_folder / STOP_FILE}: cannot be written ({error.strerror}), so the ranks go on; SIGTERM ends them now"
            asked.append(signal.SIGTERM)
        os.write(sys.stderr.fileno(), f"glmv: {said}\n".encode())

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, take)


def _last_place(run_folder: Path, rank: int) -> str:
    """Where a rank was last heard of, from the file that its watchdog keeps."""
    try:
        beat = json.loads((run_folder / "ranks" / f"rank_{rank:04d}.json").read_bytes().rstrip(b"\0 \n"))
    except (OSError, ValueError):
        return "before its first step"
    return f"at step {beat['step']} ({beat['phase']})"
