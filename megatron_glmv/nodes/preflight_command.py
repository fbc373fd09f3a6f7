"""``glmv preflight``: measure this node, or judge all nodes of a job, or, without a launcher, both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_glmv.nodes.preflight import measure, node_name
from megatron_glmv.nodes.preflight_report import Limits, report


def run_measure(folder: Path, among: Sequence[str], ranks: int | None, timeout_s: float, limits: Limits) -> int:
    """Measure this node; where no other nodes are named, print the table at once.

    Returns:
        0; 1 where this node alone was checked and is not well.
    """
    start = time.monotonic()
    measure(folder, among or [node_name()], ranks=ranks, timeout_s=timeout_s)
    if among:
        print(f"{node_name()}: measured in {time.monotonic() - start:.1f} s")
        return 0
    return 0 if report(folder, [node_name()], limits, usable=lambda count: True, least=1, most=1) else 1


def run_judge(
    folder: Path,
    nodes: Sequence[str],
    limits: Limits,
    *,
    usable: Callable[[int], bool],
    least: int | None,
    most: int | None,
    measured: bool,
) -> int:
    """Judge the nodes of a job.

    Returns:
        0 when enough are well, else 1.
    """
    most = most or len(nodes)
    return 0 if report(folder, nodes, limits, usable=usable, least=least or 1, most=most, measured=measured) else 1
