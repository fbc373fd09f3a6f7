"""What several commands of ``glmv`` take and do alike: a configuration, a schema, ranks, exit codes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from megatron_glmv.config.base import Config, ConfigError, load_tree, validate
from megatron_glmv.config.rl_stage import RlConfig
from megatron_glmv.config.training import StageConfig, TrainConfig

OK, FAILED, BAD_USAGE = 0, 1, 2
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    commands: Commands, name: str, call: Callable[[argparse.Namespace], int], *, summary: str, description: str
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: of ``glmv``.
        name: the word for it.
        call: runs it on the parsed arguments and returns the exit code.
        summary: its line in ``glmv --help``.
        description: above its arguments in ``glmv NAME --help``, with the line breaks it has.

    Returns:
        Its parser, still without arguments.
    """
    plain = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(name, help=summary, description=description, formatter_class=plain)
    command.set_defaults(call=call)
    return command


def add_configuration(command: argparse.ArgumentParser, *, required: bool) -> None:
    """Files and overrides of a configuration, as `arguments.configuration`; `load_stage` reads it."""
    command.add_argument(
        "configuration",
        nargs="+" if required else "*",
        metavar="FILE.yaml | a.b=value",
        help="YAML files, merged left to right, then overrides",
    )


def add_schema(command: argparse.ArgumentParser) -> None:
    """``--schema``; `print_schema` answers it."""
    command.add_argument(
        "--schema", action="store_true", help="print every key with its type, range and meaning as JSON schema"
    )


def split_items(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files and overrides of a command line: an override has an equals sign and is no file."""
    overrides = [item for item in items if "=" in item and not Path(item).is_file()]
    return [item for item in items if item not in overrides], overrides


def load_stage(items: Sequence[str], root: type[StageConfig] | None = None) -> StageConfig:
    """The checked tree of a command line's files and overrides.

    Args:
        items: files and overrides.
        root: what the command runs; None: the one that fits, which is RL where there are prompts.

    Raises:
        ConfigError: no file, a file of the other command, or a configuration that cannot be used.
    """
    files, overrides = split_items(items)
    if not files:
        raise ConfigError("no configuration file given; examples/ holds one for every stage")
    tree = load_tree(files, overrides)
    if root is not None and (root is RlConfig) != ("prompts" in tree):
        other = "glmv rl" if "prompts" in tree else "glmv train"
        raise ConfigError(f"{', '.join(files)}: {'has' if 'prompts' in tree else 'has no'} prompts; it is a file for {other}")
    root = RlConfig if "prompts" in tree else TrainConfig
    try:
        config = validate(root, tree, where=", ".join(files))
    except ConfigError as error:
        hint = "glmv rl --schema" if root is RlConfig else "glmv check --schema"
        raise ConfigError(str(error).replace("glmv check --schema", hint)) from None
    config.check()
    return config


def print_schema(root: type[Config]) -> int:
    """Print a configuration's JSON schema; returns the exit code."""
    print(json.dumps(root.model_json_schema(), indent=1, ensure_ascii=False))
    return OK
