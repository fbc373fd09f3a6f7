"""The check of nodes before a run: real measurements of two "nodes" on this machine, and judgement as tables of cases."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_glmv import cli
from megatron_glmv.nodes.preflight import NodeReport, neighbours, read_reports
from megatron_glmv.nodes.preflight_report import Limits, choose, judge
from tests.stages import REPOSITORY

LIMITS = Limits()


def start_measuring(folder: Path, node: str, among: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_glmv", "preflight", str(folder), "--among", among, *options],
        env={**os.environ, "SLURMD_NODENAME": node, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports of a and b, each with two ranks; c never comes."""
    folder = tmp_path_factory.mktemp("preflight")
    running = [start_measuring(folder, node, "a,b", "--ranks-per-node", "2", "--timeout-s", "400") for node in ("a", "b")]
    for process in running:
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output
    return folder


def test_every_part_is_measured(measured: Path) -> None:
    reports = read_reports(measured)
    assert sorted(reports) == ["a", "b"]
    for report in reports.values():
        assert len(report.gemm_tflops) == 2
        assert min(report.gemm_tflops) > 0
        assert report.local_gb_s is not None
        assert report.write_mb_s > 0
        assert report.memory_gb > 0
        assert not report.faults
        assert {"python", "torch", "megatron-core", "megatron-glmv"} <= set(report.versions)
    a, b = reports["a"], reports["b"]
    assert a.pair_gb_s["b"] == pytest.approx(b.pair_gb_s["a"], rel=0.9)
    assert abs(a.clock_s["b"]) < LIMITS.clock_s
    assert a.clock_s["b"] == pytest.approx(-b.clock_s["a"])


def test_the_silent_node_alone_is_left_out(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["preflight", str(measured), "--judge", "a,b,c", "--ranks-per-node", "2", "--slow", "0"]
    assert cli.main([*words, "--least", "2"]) == 0
    assert (measured / "exclude.txt").read_text(encoding="utf-8") == "c\n"
    assert (measured / "use.txt").read_text(encoding="utf-8").splitlines()[:2] == ["a,b", "2"]
    assert cli.main([*words, "--least", "3"]) == 1
    table = capsys.readouterr().out
    assert [line.split()[-2:] for line in table.splitlines() if line.startswith("c ")] == [["no", "answer"]] * 2


def test_a_neighbour_that_never_comes_holds_nobody_up(tmp_path: Path) -> None:
    timeout_s = 20.0
    process = start_measuring(tmp_path, "a", "a,z", "--timeout-s", str(timeout_s))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert read_reports(tmp_path)["a"].pair_gb_s == {"z": None}
    assert float(output.split()[-2]) < 2 * timeout_s, output


def well(node: str, **changes: object) -> NodeReport:
    versions = {"python": "3.11", "torch": "2"}
    report = NodeReport(node, 8, 900.0, 5000.0, 800.0, 10000, versions, [700.0] * 8, 300.0, {}, {}, [])
    return replace(report, **changes)


def ring(speeds: dict[tuple[str, str], float | None], **clocks: float) -> dict[str, NodeReport]:
    """Four nodes in two rounds of pairs; 40 GB/s where nothing else is said."""
    nodes = ["a", "b", "c", "d"]
    reports = {}
    for node in nodes:
        peers = [peer for peer in neighbours(nodes, node) if peer]
        pairs = {peer: speeds.get((min(node, peer), max(node, peer)), 40.0) for peer in peers}
        shift = {peer: clocks.get(node, 0.0) - clocks.get(peer, 0.0) for peer in peers if pairs[peer]}
        reports[node] = well(node, pair_gb_s=pairs, clock_s=shift)
    return reports


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        (ring({}), {}),
        (
            {**ring({}), "b": replace(ring({})["b"], gemm_tflops=[700.0] * 7 + [350.0])},
            {"b": "50%"},
        ),
        ({**ring({}), "b": replace(ring({})["b"], local_gb_s=100.0)}, {"b": "within the node at 33%"}),
        (ring({("a", "b"): 10.0, ("b", "c"): 12.0}), {"b": "at 30% of the median"}),
        (ring({("a", "b"): 10.0}), {}),  # one slow link between nodes that do well with others
        (ring({("a", "b"): None, ("b", "c"): None}), {"b": "cannot talk to a or c"}),
        ({**ring({}), "c": replace(ring({})["c"], faults=["GPU 3: 2 uncorrected memory errors"])}, {"c": "GPU 3"}),
        ({**ring({}), "d": replace(ring({})["d"], versions={"python": "3.11", "torch": "1"})}, {"d": "torch 1, not 2"}),
        ({**ring({}), "d": replace(ring({})["d"], memory_gb=0.5)}, {"d": "0.5 GB of memory"}),
        ({**ring({}), "d": replace(ring({})["d"], disk_gb=0.5)}, {"d": "0.5 GB of the shared folder"}),
        (ring({}, c=7.0), {"c": "differ by 7.0 s"}),
        (
            {node: report for node, report in ring({("a", "b"): None, ("b", "c"): None}).items() if node != "b"},
            {"b": "no answer"},
        ),
    ],
    ids=[
        "all are well",
        "one slow device",
        "slow inside",
        "slow with both",
        "slow with one",
        "mute with both",
        "memory errors",
        "another version",
        "memory",
        "disk",
        "clock",
        "dead",
    ],
)
def test_who_is_named(reports: dict[str, NodeReport], expected: dict[str, str]) -> None:
    found = judge(["a", "b", "c", "d"], reports, LIMITS)
    assert found.keys() == expected.keys()
    for node, text in expected.items():
        assert any(text in line for line in found[node]), found


def test_the_only_neighbour_of_a_broken_node_is_not_accused_with_it() -> None:
    broken = well("b", pair_gb_s={"a": None, "c": None}, faults=["GPU 0: 1 uncorrected memory errors"])
    reports = {"a": well("a", pair_gb_s={"b": None}), "b": broken, "c": well("c", pair_gb_s={"b": None})}
    assert judge(["a", "b", "c"], reports, LIMITS).keys() == {"b"}


@pytest.mark.parametrize("count", range(2, 10))
def test_neighbours_are_mutual_and_nobody_is_alone(count: int) -> None:
    nodes = [f"n{index}" for index in range(count)]
    for node in nodes:
        found = neighbours(nodes, node)
        assert any(found)
        if count > 2 and count % 2 == 0:
            assert None not in found
            assert len(set(found)) == 2
        for number, peer in enumerate(found):
            assert peer is None or (peer != node and neighbours(nodes, peer)[number] == node)


def test_the_largest_number_of_nodes_that_the_stage_can_be_dealt_to() -> None:
    nodes, ports = [f"n{index}" for index in range(7)], {"n0": 12345}
    chosen = choose(nodes, 2, 8, lambda count: 12 % count == 0, ports)
    assert chosen is not None
    assert (len(chosen.nodes), chosen.fewest, chosen.port) == (6, 6, 12345)  # 5 cannot be used, so 6 cannot shrink
    chosen = choose(nodes, 2, 4, lambda count: 12 % count == 0, ports)
    assert chosen is not None
    assert (len(chosen.nodes), chosen.fewest) == (4, 2)
    assert choose(nodes, 8, 8, lambda count: True, ports) is None
