"""``glmv preflight`` on one node: what it has, and how fast it computes, talks and writes, in a file that outlives it.

Every node leaves NODE.node.json in a shared folder, so a node that is dead or hangs is the one whose file is missing. What
needs torch runs in processes of its own (:mod:`megatron_glmv.nodes.probe`) and under a deadline: neither a collective that
hangs nor a device that does not answer stops the node's report. Nodes are measured with one neighbour, then with the other,
so that a slow link can be told from a slow peer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_glmv.config.base import InputError

SUFFIX = ".node.json"
WRITE_BYTES = 16 << 20
PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "nvidia-dali-cuda120",
    "nvidia-dali-nightly-cuda120",
    "transformers",
)


@dataclass
class NodeReport:
    """What one node found of itself."""

    node: str
    devices: int
    """CUDA devices; 0 where nvidia-smi is not there."""
    memory_gb: float
    """Free memory, in 10^9 bytes."""
    disk_gb: float
    """Free space of the shared folder, in 10^9 bytes."""
    write_mb_s: float
    """Writing to the shared folder, through to the disk, in 10^6 bytes a second."""
    port: int
    """Free for the rendezvous."""
    versions: dict[str, str]
    gemm_tflops: list[float] = field(default_factory=list)
    """Matrix products of each rank, in 10^12 operations a second."""
    local_gb_s: float | None = None
    """All-reduce among the ranks of the node, in 10^9 bytes a second; None with one rank."""
    pair_gb_s: dict[str, float | None] = field(default_factory=dict)
    """All-reduce with each neighbour, by its name; None: it failed."""
    clock_s: dict[str, float] = field(default_factory=dict)
    """This clock minus each neighbour's, in seconds."""
    faults: list[str] = field(default_factory=list)
    """What is broken here, whatever the other nodes are like."""


def node_name() -> str:
    """This node, as SLURM calls it; outside SLURM its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def measure(folder: Path, among: Sequence[str], *, ranks: int | None, timeout_s: float) -> NodeReport:
    """Check this node and write its report.

    Args:
        folder: of this check, on the disk that all nodes share; made when missing.
        among: all nodes that are checked together.
        ranks: processes that compute and talk; None: the node's devices, or one.
        timeout_s: for all that is measured; what has not answered then is a fault.

    Raises:
        InputError: the shared folder cannot be written.
    """
    node = node_name()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = _write_speed(folder / f"{node}.bin")
        free_disk = shutil.disk_usage(folder).free
    except OSError as error:
        raise InputError(f"{folder}: node {node} cannot write to the shared folder: {error}") from None
    gpus, faults = _gpus()
    report = NodeReport(
        node, len(gpus), _free_memory() / 1e9, free_disk / 1e9, written / 1e6, _free_port(), _versions(gpus), faults=faults
    )
    ranks = ranks or len(gpus) or 1
    if gpus and ranks > len(gpus):
        report.faults.append(f"{len(gpus)} GPUs for {ranks} ranks")
    _probe(report, folder, sorted(among) or [node], ranks, timeout_s)
    write(report, folder)
    return report


def write(report: NodeReport, folder: Path) -> None:
    """Leave a report in the shared folder, whole or not at all."""
    draft = folder / f".{report.node}.draft"
    draft.write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
    draft.replace(folder / (report.node + SUFFIX))


def read_reports(folder: Path) -> dict[str, NodeReport]:
    """All reports of a folder, by node."""
    trees = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*" + SUFFIX)))
    return {tree["node"]: NodeReport(**tree) for tree in trees}


def neighbours(nodes: Sequence[str], node: str) -> list[str | None]:
    """The peer of a node in each of the two rounds; None: it has none in that round.

    Round one pairs (0, 1), (2, 3), ...; round two (1, 2), (3, 4), ... and the last with the first where their number is even.
    """
    index, count = nodes.index(node), len(nodes)
    first = index ^ 1
    second = (((index + 1) ^ 1) - 1) % count if count % 2 == 0 else ((index + 1) ^ 1) - 1
    found = [nodes[peer] if 0 <= peer < count else None for peer in (first, second)]
    return found if count > 2 else found[:1]


def _probe(report: NodeReport, folder: Path, nodes: Sequence[str], ranks: int, timeout_s: float) -> None:
    """Run the processes that compute and talk; begin again behind a part that ended them."""
    peers = neighbours(nodes, report.node)
    parts = ["gemm", *(["local"] if ranks > 1 else []), *(f"pair{i}:{peer}" for i, peer in enumerate(peers) if peer)]
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory(prefix="glmv-preflight-") as name:
        own = Path(name)
        while parts:
            faults = _run_probes(own, folder, report.node, parts, ranks, deadline)
            done = [_read(own / f"{rank}.json") for rank in range(ranks)]
            finished = [part for part in parts if all(part in of_rank for of_rank in done)]
            _take(report, finished, done)
            parts = parts[len(finished) :]
            if not parts:
                return
            broken, parts = parts[0], parts[1:]
            _note(report, broken, faults or "ended without a word")
            for path in own.iterdir():
                path.unlink()
            if time.monotonic() > deadline:
                for part in parts:
                    _note(report, part, "no time was left")
                return


def _run_probes(own: Path, folder: Path, node: str, parts: Sequence[str], ranks: int, deadline: float) -> str:
    """Start a process a rank and wait for all; returns how the first that failed ended."""
    words = [sys.executable, "-m", "megatron_glmv.nodes.probe", str(own), str(folder), node, str(ranks), *parts]
    left = max(deadline - time.monotonic(), 1.0)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["GLMV_PROBE_PART_S"] = str(left / 4)
    running = []
    for rank in range(ranks):
        with (own / f"{rank}.log").open("wb") as log:
            running.append(
                subprocess.Popen(
                    words, env=environment | {"LOCAL_RANK": str(rank)}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )
    try:
        while time.monotonic() < deadline:
            codes = [process.poll() for process in running]
            failed = next((rank for rank, code in enumerate(codes) if code), None)
            if failed is not None:
                lines = (own / f"{failed}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
                return f"rank {failed} ended with {codes[failed]}: {lines[-1] if lines else 'no output'}"
            if all(code == 0 for code in codes):
                return ""
            time.sleep(0.05)
        return "no answer in time"
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()


def _take(report: NodeReport, parts: Sequence[str], done: Sequence[Mapping[str, Any]]) -> None:
    for part in parts:
        results = [of_rank[part] for of_rank in done]
        fault = next((result["fault"] for result in results if "fault" in result), None)
        if fault:
            _note(report, part, fault)
        elif part == "gemm":
            report.gemm_tflops = [result["tflops"] for result in results]
        elif part == "local":
            report.local_gb_s = min(result["gb_s"] for result in results)
        else:
            peer = part.partition(":")[2]
            report.pair_gb_s[peer] = min(result["gb_s"] for result in results)
            report.clock_s[peer] = results[0]["clock_s"]


def _note(report: NodeReport, part: str, fault: str) -> None:
    """A pair that fails says nothing yet about which of the two is broken; all else does."""
    if part.startswith("pair"):
        report.pair_gb_s[part.partition(":")[2]] = None
    else:
        report.faults.append(f"{'matrix products' if part == 'gemm' else 'collectives within the node'}: {fault}")


def _write_speed(path: Path) -> float:
    """Bytes a second, written through to the disk, read again and compared."""
    block = os.urandom(1 << 20)
    start = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(WRITE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        if path.read_bytes() != block * (WRITE_BYTES // len(block)):
            raise OSError("what was written reads differently")
    finally:
        path.unlink(missing_ok=True)
    return WRITE_BYTES / seconds


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _free_port() -> int:
    """A port below those that the system deals out, by job so that two jobs on a node do not meet."""
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    for attempt in range(200):
        port = 10000 + (37 * job + 101 * attempt) % 20000
        with socket.socket() as tried:
            try:
                tried.bind(("", port))
            except OSError:
                continue
            return port
    raise InputError(f"node {node_name()}: 200 ports between 10000 and 30000 are all taken")


def _gpus() -> tuple[list[dict[str, str]], list[str]]:
    """What nvidia-smi says of every device, and what is wrong with them."""
    if shutil.which("nvidia-smi") is None:
        return [], []
    keys = ("index", "name", "driver_version", "ecc.errors.uncorrected.volatile.total")
    try:
        text = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    except (subprocess.SubprocessError, OSError) as error:
        return [], [f"nvidia-smi: {error}"]
    gpus = [dict(zip(keys, map(str.strip, line.split(",")), strict=False)) for line in text.splitlines() if line.strip()]
    errors = ((gpu["index"], gpu.get(keys[-1], "")) for gpu in gpus)
    return gpus, [
        f"GPU {index}: {count} uncorrected memory errors" for index, count in errors if count.isdigit() and int(count)
    ]


def _versions(gpus: Sequence[Mapping[str, str]]) -> dict[str, str]:
    versions = {"python": sys.version.split()[0], "megatron-glmv": code_digest()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    for key, name in (("name", "GPU"), ("driver_version", "driver")):
        if gpus:
            versions[name] = " and ".join(sorted({gpu[key] for gpu in gpus}))
    return versions


def code_digest() -> str:
    """Twelve hexadecimal digits of this package's source, whether or not there is a git."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in _sources(root):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _sources(root: Path) -> Iterator[Path]:
    yield from sorted(path for path in root.rglob("*") if path.suffix in (".py", ".json") and path.is_file())


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
