"""``glmv``: parse the command line, call the command, turn errors into one line and an exit code.

A command's arguments stand beside the function that reads them, in the room of its subject. What computes lives on lower floors
and is imported by name only when it is called, so that ``glmv check`` and ``glmv --help`` answer without loading torch.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from megatron_glmv import __version__
from megatron_glmv.cli import descriptions
from megatron_glmv.cli.arguments import BAD_USAGE, FAILED
from megatron_glmv.cli.cluster import add_cluster_commands
from megatron_glmv.cli.conversions import add_conversion_commands
from megatron_glmv.cli.reward import add_reward_command
from megatron_glmv.cli.runs import add_run_commands
from megatron_glmv.cli.stages import add_stage_commands
from megatron_glmv.config.base import ConfigError, InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one ``glmv`` command.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad configuration or usage.
    """
    arguments = _parse(argv)
    try:
        return arguments.call(arguments)
    except ConfigError as error:
        return _report(str(error), BAD_USAGE)
    except InputError as error:
        return _report(str(error), FAILED)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``glmv``."""
    parser = argparse.ArgumentParser(
        prog="glmv",
        description="Train GLM-4.1V in tensor, pipeline, sequence, context and data parallel.",
        epilog=descriptions.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron-glmv {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_stage_commands(commands)
    add_run_commands(commands)
    add_cluster_commands(commands)
    add_conversion_commands(commands)
    add_reward_command(commands)
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes a list of positionals in one piece; here overrides may also follow an option: FILE --ranks 4 steps=5.
    if rest and (not hasattr(arguments, "configuration") or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.configuration += rest
    return arguments


def _report(message: str, code: int) -> int:
    """Print one line for the user; under torchrun, name the rank where ranks can differ."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank != 0:
        # Mostly every rank has found the same fault: let rank 0 say it, and end the others, before this one speaks.
        time.sleep(2)
        if code == BAD_USAGE:
            return code
    rank = f"rank {os.environ['RANK']}: " if code == FAILED and "RANK" in os.environ else ""
    print(f"glmv: error: {rank}{' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
