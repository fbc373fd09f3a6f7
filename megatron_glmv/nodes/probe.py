"""One measuring process of ``glmv preflight``: matrix products, and all-reduce within the node and with each neighbour.

Started by :mod:`megatron_glmv.nodes.preflight`, once a rank. The result of each part stands in a file at once, so that what
was measured before a process dies is kept.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LOOK_S = 0.05


class Probe:
    """Measures on this rank.

    Args:
        own: folder of this node alone, for results and the store of its ranks.
        shared: folder that the neighbours see.
        node: this node's name.
        ranks: processes of each node.
    """

    def __init__(self, own: Path, shared: Path, node: str, ranks: int) -> None:
        self._own, self._shared, self._node, self._ranks = own, shared, node, ranks
        self._rank = int(os.environ["LOCAL_RANK"])
        self._part_s = float(os.environ["GLMV_PROBE_PART_S"])
        self._cuda = torch.cuda.is_available()
        if self._cuda:
            torch.cuda.set_device(self._rank)
        self._device = torch.device("cuda", self._rank) if self._cuda else torch.device("cpu")
        self._done: dict[str, dict[str, Any]] = {}

    def run(self, parts: list[str]) -> None:
        """Measure the parts in order: gemm, local, and pairNUMBER:PEER."""
        for part in parts:
            kind, _, peer = part.partition(":")
            calls: dict[str, Callable[[], dict[str, Any]]] = {"gemm": self._gemm, "local": self._local}
            try:
                found = calls[kind]() if kind in calls else self._pair(kind, peer)
            except Exception as error:  # noqa: BLE001  (whatever it is, it is the result)
                found = {"fault": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            if dist.is_initialized():
                dist.destroy_process_group()
            self._done[part] = found
            draft = self._own / f"{self._rank}.draft"
            draft.write_text(json.dumps(self._done), encoding="utf-8")
            draft.replace(self._own / f"{self._rank}.json")

    def _gemm(self) -> dict[str, Any]:
        """Square matrix products: bf16 on a device, fp32 on a CPU."""
        size, dtype, rounds = (8192, torch.bfloat16, 100) if self._cuda else (512, torch.float32, 100)
        left, right = (torch.randn(size, size, dtype=dtype, device=self._device) for _ in range(2))
        seconds = self._seconds(lambda: left @ right, rounds)
        return {"tflops": 2 * size**3 / seconds / 1e12}

    def _local(self) -> dict[str, Any]:
        store = dist.FileStore(str(self._own / "store"), self._ranks)
        self._join(store, self._rank, self._ranks)
        return {"gb_s": self._all_reduce()}

    def _pair(self, kind: str, peer: str) -> dict[str, Any]:
        """All-reduce over all ranks of two nodes; the store is the first rank's of the node that comes first."""
        hosts = self._node < peer
        step = f"{os.environ.get('SLURM_JOB_ID', '')}.{os.environ.get('SLURM_STEP_ID', '')}"  # a folder may be used again
        meeting = self._shared / f".{kind}.{min(self._node, peer)}.{max(self._node, peer)}.{step}"
        timeout = dt.timedelta(seconds=self._part_s)
        if hosts and self._rank == 0:
            store = dist.TCPStore(socket.getfqdn(), 0, is_master=True, wait_for_workers=False, timeout=timeout)
            draft = meeting.with_name(meeting.name + ".draft")
            draft.write_text(json.dumps([socket.getfqdn(), store.port]), encoding="utf-8")
            draft.replace(meeting)
        else:
            host, port = self._read_when_there(meeting, peer)
            store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
        self._join(store, self._rank + (0 if hosts else self._ranks), 2 * self._ranks)
        dist.barrier()
        clocks = [torch.zeros(1, dtype=torch.float64, device=self._device) for _ in range(2 * self._ranks)]
        dist.all_gather(clocks, torch.tensor([time.time()], dtype=torch.float64, device=self._device))
        if hosts and self._rank == 0:
            meeting.unlink(missing_ok=True)
        first, second = float(clocks[0]), float(clocks[self._ranks])
        return {"gb_s": self._all_reduce(), "clock_s": first - second if hosts else second - first}

    def _read_when_there(self, path: Path, peer: str) -> tuple[str, int]:
        deadline = time.monotonic() + self._part_s
        while time.monotonic() < deadline:
            try:
                host, port = json.loads(path.read_text(encoding="utf-8"))
                return host, port
            except (OSError, ValueError):
                time.sleep(LOOK_S)
        raise TimeoutError(f"{peer} has not come")

    def _join(self, store: dist.Store, rank: int, world_size: int) -> None:
        dist.init_process_group(
            "nccl" if self._cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=dt.timedelta(seconds=self._part_s),
        )

    def _all_reduce(self) -> float:
        """10^9 bytes a second."""
        size, rounds = (256 << 20, 20) if self._cuda else (4 << 20, 10)
        values = torch.ones(size // 4, device=self._device)
        return size / self._seconds(lambda: dist.all_reduce(values), rounds) / 1e9

    def _seconds(self, call: Callable[[], object], rounds: int) -> float:
        """Seconds of one call, over many in a row: what a run gets, with whatever else slows this node down."""
        for _ in range(2):
            call()
        self._finish()
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        self._finish()
        return (time.perf_counter() - start) / rounds

    def _finish(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


if __name__ == "__main__":
    Probe(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])).run(sys.argv[5:])
