"""The command that scores answers in a file: reward."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from megatron_glmv.cli import descriptions
from megatron_glmv.cli.arguments import Commands, add_command, print_schema, split_items
from megatron_glmv.config.base import ConfigError, load
from megatron_glmv.config.rewards import RewardsConfig


def add_reward_command(commands: Commands) -> None:
    """Add it to the command line."""
    summary = "score answers in a file, with a table of each domain"
    command = add_command(commands, "reward", _reward, summary=summary, description=descriptions.REWARD)
    command.add_argument("file", type=Path, nargs="?", metavar="FILE.jsonl", help="answers, one a line")
    command.add_argument(
        "--config",
        nargs="+",
        default=[],
        metavar="FILE.yaml | a.b=value",
        help="settings: domains, gates, judge; merged left to right, then overrides (default: every domain's own, no judge)",
    )
    command.add_argument("--out", type=Path, metavar="SCORED.jsonl", help="scores to write (default: FILE.scored.jsonl)")
    command.add_argument("--schema", action="store_true", help="print every setting with its type, range and meaning")


def _reward(arguments: argparse.Namespace) -> int:
    if arguments.schema:
        return print_schema(RewardsConfig)
    if arguments.file is None:
        raise ConfigError("no file of answers given; `glmv reward --help` says what its lines hold")
    files, overrides = split_items(arguments.config)
    try:
        config = load(RewardsConfig, files, overrides)
    except ConfigError as error:
        raise ConfigError(str(error).replace("glmv check --schema", "glmv reward --schema")) from None
    return importlib.import_module("megatron_glmv.rl.rewards.command").run(arguments.file, config, arguments.out)
