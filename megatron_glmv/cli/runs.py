"""The commands that take a run's folder: status, stop."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from megatron_glmv.cli import descriptions
from megatron_glmv.cli.arguments import OK, Commands, add_command


def add_run_commands(commands: Commands) -> None:
    """Add them to the command line."""
    summary = "what a run's folder says of it"
    command = add_command(commands, "status", _status, summary=summary, description=descriptions.STATUS)
    _add_run_folder(command)
    command.add_argument(
        "--exit-code", action="store_true", help="end with 0: finished, 3: can go on, 1: a restart would fail the same way"
    )

    text = "count only what the ranks of this launch have said: torchrun's --rdzv-id"
    command.add_argument("--launch", default="", metavar="ID", help=text)

    summary = "save a run and end it after the step it is in"
    command = add_command(commands, "stop", _stop, summary=summary, description=descriptions.STOP)
    _add_run_folder(command)


def _add_run_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="run_folder of the configuration")


def _status(arguments: argparse.Namespace) -> int:
    status = importlib.import_module("megatron_glmv.run_folder.status")
    code = status.print_status(arguments.run_folder, for_script=arguments.exit_code, launch=arguments.launch)
    return code if arguments.exit_code else OK


def _stop(arguments: argparse.Namespace) -> int:
    print(importlib.import_module("megatron_glmv.run_folder.stop_file").request_stop(arguments.run_folder))
    return OK
