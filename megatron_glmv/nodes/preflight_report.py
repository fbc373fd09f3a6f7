"""``glmv preflight --judge``: which nodes are missing, broken or slow, and which of the others a run takes.

A node is held to the other nodes of the same check: speeds to their median, versions to what most have. A pair of neighbours
that cannot talk, or talks slowly, accuses a node only if all its pairs with nodes that are otherwise well do: a healthy node
whose neighbour is broken still does well with the other one.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_glmv.config.base import InputError
from megatron_glmv.nodes.preflight import NodeReport, read_reports


@dataclass(frozen=True)
class Limits:
    """What a node must have."""

    slow: float = 0.7
    """Share of the median speed below which a node is slow."""
    clock_s: float = 5.0
    """Seconds by which a clock may differ from its neighbours'."""
    memory_gb: float = 1.0
    """Free memory, in 10^9 bytes."""
    disk_gb: float = 1.0
    """Free space of the shared folder, in 10^9 bytes."""


@dataclass(frozen=True)
class Choice:
    """The nodes of a run."""

    nodes: tuple[str, ...]
    fewest: int
    """The run goes on by itself while it has these many of them."""
    port: int
    """Free on the first node; 0: not measured."""


def judge(nodes: Sequence[str], reports: Mapping[str, NodeReport], limits: Limits) -> dict[str, list[str]]:
    """What is wrong with each node; those that are well are missing.

    Args:
        nodes: that were to report.
        reports: that came.
        limits: to hold them to.
    """
    wrong: dict[str, list[str]] = {node: [] for node in nodes}
    for node in nodes:
        report = reports.get(node)
        if report is None:
            wrong[node].append("no answer")
        else:
            wrong[node] += [*report.faults, *_shortages(report, limits)]
    present = [reports[node] for node in nodes if node in reports]
    for node, difference in _odd_versions(present):
        wrong[node].append(difference)
    speeds = {
        "matrix products": {report.node: min(report.gemm_tflops) for report in present if report.gemm_tflops},
        "all-reduce within the node": {report.node: report.local_gb_s for report in present if report.local_gb_s},
    }
    for what, of_nodes in speeds.items():
        median = statistics.median_high(of_nodes.values()) if of_nodes else 0.0
        for node, speed in of_nodes.items():
            if speed < limits.slow * median:
                wrong[node].append(f"{what} at {speed / median:.0%} of the median")
    _judge_pairs(present, wrong, limits)
    return {node: found for node, found in wrong.items() if found}


def _shortages(report: NodeReport, limits: Limits) -> Iterable[str]:
    if report.memory_gb < limits.memory_gb:
        yield f"{report.memory_gb:.1f} GB of memory are free"
    if report.disk_gb < limits.disk_gb:
        yield f"{report.disk_gb:.1f} GB of the shared folder are free"


def _odd_versions(reports: Sequence[NodeReport]) -> Iterable[tuple[str, str]]:
    """Nodes whose versions are not those of most; where none are most, the first node's count."""
    for name in sorted({name for report in reports for name in report.versions}):
        found = [report.versions.get(name, "none") for report in reports]
        usual = Counter(found).most_common(1)[0][0]
        for report, version in zip(reports, found, strict=True):
            if version != usual:
                yield report.node, f"{name} {version}, not {usual}"


def _judge_pairs(reports: Sequence[NodeReport], wrong: dict[str, list[str]], limits: Limits) -> None:
    speeds = [speed for report in reports for speed in report.pair_gb_s.values() if speed]
    median = statistics.median_high(speeds) if speeds else 0.0
    accused = {node for node, found in wrong.items() if found}
    for report in reports:
        fair = {peer: speed for peer, speed in report.pair_gb_s.items() if peer not in accused}
        if fair and all(speed is None for speed in fair.values()):
            wrong[report.node].append(f"cannot talk to {' or '.join(fair)}")
        elif fair and all((speed or 0.0) < limits.slow * median for speed in fair.values()):
            best = max(speed or 0.0 for speed in fair.values())
            wrong[report.node].append(f"all-reduce with {' and '.join(fair)} at {best / median:.0%} of the median")
        clocks = {peer: report.clock_s[peer] for peer in fair if peer in report.clock_s}
        if clocks and all(abs(difference) > limits.clock_s for difference in clocks.values()):
            peer, difference = next(iter(clocks.items()))
            wrong[report.node].append(f"its clock and that of {peer} differ by {abs(difference):.1f} s")


def choose(
    nodes: Sequence[str], least: int, most: int, usable: Callable[[int], bool], ports: Mapping[str, int]
) -> Choice | None:
    """The largest usable number of the nodes; None where too few are left.

    Args:
        nodes: that are well, in the order of the allocation.
        least: no fewer.
        most: no more; the others are spares.
        usable: whether the stage can be dealt to so many nodes.
        ports: free on each.
    """
    count = next((n for n in range(min(len(nodes), most), max(least, 1) - 1, -1) if usable(n)), None)
    if count is None:
        return None
    fewest = count
    while fewest > max(least, 1) and usable(fewest - 1):
        fewest -= 1
    return Choice(tuple(nodes[:count]), fewest, ports.get(nodes[0], 0))


def describe(nodes: Sequence[str], reports: Mapping[str, NodeReport], wrong: Mapping[str, Sequence[str]]) -> str:
    """A table with a line a node, and behind it what is wrong."""
    head = ("node", "GPUs", "TFLOP/s", "node GB/s", "pair GB/s", "write MB/s", "memory GB", "disk GB", "state")
    rows: list[tuple[str, ...]] = [head]
    for node in nodes:
        state = "; ".join(wrong.get(node, ["well"]))
        report = reports.get(node)
        if report is None:
            rows.append((node, *["-"] * 7, state))
            continue
        pairs = "/".join("failed" if speed is None else f"{speed:.3g}" for speed in report.pair_gb_s.values())
        rows.append(
            (
                node,
                str(report.devices),
                f"{min(report.gemm_tflops):.3g}" if report.gemm_tflops else "-",
                f"{report.local_gb_s:.3g}" if report.local_gb_s else "-",
                pairs or "-",
                f"{report.write_mb_s:.0f}",
                f"{report.memory_gb:.0f}",
                f"{report.disk_gb:.0f}",
                state,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def report(
    folder: Path,
    nodes: Sequence[str],
    limits: Limits,
    *,
    usable: Callable[[int], bool],
    least: int,
    most: int,
    measured: bool = True,
) -> bool:
    """Print the table, and write use.txt and exclude.txt.

    use.txt has a line each for nodes, the fewest that can go on, a free port and spare nodes.

    Args:
        folder: with the reports.
        nodes: that were to report, in the order of the allocation.
        limits: to hold them to.
        usable: whether the stage can be dealt to so many nodes.
        least: no fewer nodes.
        most: no more.
        measured: False takes every node as well, without a report.

    Returns:
        Whether enough nodes are well.

    Raises:
        InputError: a number of nodes that nothing can be dealt to.
    """
    if least < 1 or most < least:
        raise InputError(f"preflight: at least {least} and at most {most} nodes is no range")
    reports = read_reports(folder) if measured else {}
    wrong = judge(nodes, reports, limits) if measured else {}
    if measured:
        print(describe(nodes, reports, wrong))
    (folder / "exclude.txt").write_text(",".join(wrong) + "\n" if wrong else "", encoding="utf-8")
    well = [node for node in nodes if node not in wrong]
    chosen = choose(well, least, most, usable, {node: report.port for node, report in reports.items()})
    if chosen is None:
        print(f"preflight: {len(well)} of {len(nodes)} nodes are well; no number of them from {least} to {most} can be used")
        return False
    if wrong:
        print(f"preflight: left out {', '.join(wrong)}; {len(chosen.nodes)} nodes are used")
    spare = [node for node in well if node not in chosen.nodes]
    lines = (",".join(chosen.nodes), str(chosen.fewest), str(chosen.port), ",".join(spare))
    (folder / "use.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return True
