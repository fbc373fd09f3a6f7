"""The commands of a cluster's jobs: preflight before the run, errors after it."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from megatron_glmv.cli import descriptions
from megatron_glmv.cli.arguments import OK, Commands, add_command, add_configuration, load_stage
from megatron_glmv.config.base import ConfigError


def add_cluster_commands(commands: Commands) -> None:
    """Add them to the command line."""
    summary = "check the nodes before a run"
    command = add_command(commands, "preflight", _preflight, summary=summary, description=descriptions.PREFLIGHT)
    _add_preflight_arguments(command)

    summary = "what ended a job, first error on top"
    command = add_command(commands, "errors", _errors, summary=summary, description=descriptions.ERRORS)
    command.add_argument("folder", type=Path, metavar="LOG_FOLDER", help="RUN_FOLDER/logs, or a launch's folder in it")


def _add_preflight_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, metavar="FOLDER", help="of this check, on a disk that all nodes share")
    add_configuration(command, required=False)
    command.add_argument("--among", metavar="NODES", help="measure this node as one of these, with commas between")
    command.add_argument("--judge", metavar="NODES", help="judge what these nodes have measured, with commas between")
    command.add_argument("--ranks-per-node", type=int, metavar="N", help="(default: the node's GPUs; 1 without)")
    command.add_argument("--least", type=int, metavar="N", help="no fewer nodes can be used (default: 1)")
    command.add_argument("--most", type=int, metavar="N", help="use no more nodes (default: all)")
    command.add_argument("--unmeasured", action="store_true", help="take every node as well: nothing was measured")
    command.add_argument(
        "--slow",
        type=float,
        default=0.7,
        metavar="SHARE",
        help="of the median speed, below which a node is slow (default: 0.7)",
    )
    command.add_argument(
        "--clock-s", type=float, default=5.0, metavar="S", help="by which clocks of neighbours may differ (default: 5)"
    )
    command.add_argument("--memory-gb", type=float, default=1.0, metavar="GB", help="that must be free (default: 1)")
    command.add_argument(
        "--disk-gb", type=float, default=1.0, metavar="GB", help="that must be free in FOLDER's file system (default: 1)"
    )
    command.add_argument("--timeout-s", type=float, default=120.0, metavar="S", help="for all measurements (default: 120)")


def _preflight(arguments: argparse.Namespace) -> int:
    command = importlib.import_module("megatron_glmv.nodes.preflight_command")
    limits = importlib.import_module("megatron_glmv.nodes.preflight_report").Limits(
        arguments.slow, arguments.clock_s, arguments.memory_gb, arguments.disk_gb
    )
    ranks = arguments.ranks_per_node
    if ranks is not None and ranks < 1:
        raise ConfigError(f"--ranks-per-node: {ranks} is not a number of ranks; give 1 or more")
    if not arguments.judge:
        among = arguments.among.split(",") if arguments.among else []
        return command.run_measure(arguments.folder, among, ranks, arguments.timeout_s, limits)
    config = load_stage(arguments.configuration) if arguments.configuration else None

    def usable(num_nodes: int) -> bool:
        try:
            return config is None or config.data_parallel(num_nodes * (ranks or 1)) > 0
        except ConfigError:
            return False

    return command.run_judge(
        arguments.folder,
        arguments.judge.split(","),
        limits,
        usable=usable,
        least=arguments.least,
        most=arguments.most,
        measured=not arguments.unmeasured,
    )


def _errors(arguments: argparse.Namespace) -> int:
    print(importlib.import_module("megatron_glmv.nodes.rank_logs").summarize(arguments.folder))
    return OK
