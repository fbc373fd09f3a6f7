"""Start ranks on this machine, as torchrun does, and end with their exit code instead of a page of tracebacks."""

from __future__ import annotations

import json
import logging
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def start_ranks(num_ranks: int, arguments: Sequence[str], run_folder: Path, max_restarts: int = 0) -> int:
    """Run ``python -m megatron_glmv ARGUMENTS`` in `num_ranks` processes; when one fails, the others are ended.

    Args:
        num_ranks: processes.
        arguments: after the program's name.
        run_folder: of the run; a rank that is killed is looked up in its ranks/ for where it was.
        max_restarts: times that all ranks are started again, to go on from the newest checkpoint, before that is a failure.

    Returns:
        0 when all ranks succeeded, else the exit code of the first that failed.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    # A store of its own for every start: torch 2.13 gives a restarted group the agent's store with the addresses of the dead
    # ranks in it (distributed/elastic/rendezvous/dynamic_rendezvous.py), and connecting to them fails.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=max_restarts,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "megatron_glmv", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode  # the rank has said why
        place = _last_place(run_folder, rank)
        print(f"glmv: error: rank {rank} was killed by signal {-failure.exitcode} {place}", file=sys.stderr, flush=True)
        return 1
    return 0


def _last_place(run_folder: Path, rank: int) -> str:
    """Where a rank was last heard of, from the file that its watchdog keeps."""
    try:
        beat = json.loads((run_folder / "ranks" / f"rank_{rank:04d}.json").read_bytes().rstrip(b"\0 \n"))
    except (OSError, ValueError):
        return "before its first step"
    return f"at step {beat['step']} ({beat['phase']})"
