"""Real processes for tests that need several ranks.

Each rank has the environment that ``torchrun`` gives. It is forked from a process that has loaded the modules (`zygote.py`);
with CUDA it is a fresh interpreter, as those of `glmv train` and `glmv rl` always are (`stages.py`). The rendezvous store lives
in the test's own process: no port is guessed, and it outlives a rank that dies.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.zygote import Forked, fork

REPOSITORY = Path(__file__).resolve().parents[1]
Rank = subprocess.Popen[bytes] | Forked
PARITY_PACKAGES = str(Path(sys.prefix) / "parity")
GRACE_S = 5.0
TAIL_CHARS = 4000


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one rank ended."""

    rank: int
    exit_code: int
    """Negative: ended by this signal."""
    result: Any
    """What the function returned; None unless the exit code is 0."""
    output: str
    """Standard output and standard error, interleaved."""
    seconds: float
    """From the start of all ranks to the end of this one."""


def leave_layout() -> None:
    """End the groups of a layout, and gloo's threads with them, so that a rank can go on to another; every rank must call it.

    A group ends with the last reference to it. Those of a model lie in cycles, and what the caller still holds goes next time.
    """
    import gc

    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if not dist.is_initialized():
        return
    dist.barrier()  # nobody closes a connection that another still reads
    for group in list(dist.distributed_c10d._world.pg_map):
        if group != dist.group.WORLD:
            dist.destroy_process_group(group)
    del group
    gc.collect()


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call ``function(rank, *args)`` in `world_size` processes and return what each returned, in rank order.

    Args:
        function: a module-level function; it initialises torch.distributed itself, from the environment (``env://``).
        world_size: number of processes.
        args: picklable arguments, the same for every rank.
        timeout_s: ranks that are alive after this many seconds are killed.

    Raises:
        AssertionError: a rank raised, died or ran out of time; the message holds the end of every failed rank's output,
            the first to fail first.
    """
    outcomes = watch_ranks(function, world_size, *args, timeout_s=timeout_s, stop_on_failure=True)
    # The first to end is the cause; the others usually lost it as a peer.
    failed = sorted((outcome for outcome in outcomes if outcome.exit_code), key=lambda outcome: outcome.seconds)
    if failed:
        parts = [f"--- rank {o.rank} of {world_size} ended with {o.exit_code}\n{o.output[-TAIL_CHARS:]}" for o in failed]
        raise AssertionError(f"{function.__qualname__} failed within {timeout_s:g} s:\n" + "\n".join(parts))
    return [outcome.result for outcome in outcomes]


def watch_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    stop_on_failure: bool = False,
) -> list[Outcome]:
    """Like :func:`run_ranks`, but report how each rank ended instead of raising.

    Args:
        stop_on_failure: kill the others a few seconds after the first failure; otherwise each ends by itself.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        (folder / "call.pickle").write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
        processes = [_start(folder, rank, world_size, store.port) for rank in range(world_size)]
        started = time.monotonic()
        ended = _wait(processes, started, timeout_s, stop_on_failure)
        return [_outcome(folder, rank, process.returncode, ended[rank]) for rank, process in enumerate(processes)]


def _start(folder: Path, rank: int, world_size: int, port: int) -> Rank:
    import torch

    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The store is the test's, as it is the agent's under torchrun: no rank opens one.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONUNBUFFERED": "1",
        # Without the packages that the fixture torchvision_shim adds for pytest's own process: a rank has no shim.
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *(entry for entry in sys.path if entry and entry != PARITY_PACKAGES)]),
    }
    if not torch.cuda.is_available():
        return fork(rank, "tests.ranks", "_main", [str(folder), rank], environment, folder / f"output_{rank}.txt")
    with (folder / f"output_{rank}.txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(folder), str(rank)],
            env=environment,
            cwd=Path.cwd(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _wait(processes: list[Rank], started: float, timeout_s: float, stop: bool) -> list[float]:
    """Wait for all processes; kill what is left at the deadline. Returns the second each one ended at."""
    deadline = started + timeout_s
    ended = [0.0] * len(processes)
    try:
        while None in [process.poll() for process in processes]:
            now = time.monotonic()
            for rank, process in enumerate(processes):
                if process.returncode is not None and not ended[rank]:
                    ended[rank] = now - started
                    if stop and process.returncode:
                        deadline = min(deadline, now + GRACE_S)
            if now > deadline:
                break
            time.sleep(0.02)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [seconds or time.monotonic() - started for seconds in ended]


def _outcome(folder: Path, rank: int, exit_code: int | None, seconds: float) -> Outcome:
    assert exit_code is not None, "a rank is still running"
    result = pickle.loads((folder / f"result_{rank}.pickle").read_bytes()) if exit_code == 0 else None
    output = (folder / f"output_{rank}.txt").read_text(errors="replace")
    return Outcome(rank, exit_code, result, output, seconds)


def _main(place: str, rank: int) -> None:
    """One rank: import the function's module, call it, store the result."""
    import importlib

    folder = Path(place)
    module, name, args = pickle.loads((folder / "call.pickle").read_bytes())
    try:
        import torch

        torch.set_num_threads(1)
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        result = function(rank, *args)
        (folder / f"result_{rank}.pickle").write_bytes(pickle.dumps(result))
    except BaseException:  # noqa: BLE001 - whatever ends a rank must reach the report
        traceback.print_exc()
        sys.stderr.flush()
        # A rank that failed must not wait in a destructor for peers that are inside a collective.
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
