"""The commands that take a stage's configuration: check, plan, train, rl."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_glmv.cli import descriptions
from megatron_glmv.cli.arguments import OK, Commands, add_command, add_configuration, add_schema, load_stage, print_schema
from megatron_glmv.config.base import ConfigError, to_yaml
from megatron_glmv.config.rl_stage import RlConfig
from megatron_glmv.config.summary import summarize
from megatron_glmv.config.training import StageConfig, TrainConfig


def add_stage_commands(commands: Commands) -> None:
    """Add them to the command line."""
    summary = "validate a configuration and show what it amounts to"
    command = add_command(commands, "check", _check, summary=summary, description=descriptions.CHECK)
    add_configuration(command, required=False)
    add_schema(command)

    summary = "memory, time and the best layouts of a stage, before it runs"
    command = add_command(commands, "plan", _plan, summary=summary, description=descriptions.PLAN)
    add_configuration(command, required=True)
    _add_plan_arguments(command)

    command = add_command(commands, "train", _train, summary="train one stage", description=descriptions.TRAIN)
    add_configuration(command, required=True)
    _add_ranks(command)

    command = add_command(commands, "rl", _rl, summary="train one stage by rewards", description=descriptions.RL)
    add_configuration(command, required=False)
    _add_ranks(command)
    add_schema(command)


def _add_plan_arguments(command: argparse.ArgumentParser) -> None:
    number: dict[str, Any] = {"type": float, "metavar": "N"}
    command.add_argument("--gpu", default="h100", metavar="NAME", help="h100, h200 or a100 (default: h100)")
    command.add_argument("--gpus", type=int, metavar="N", help="how many (default: the fewest on which the layout fits)")
    command.add_argument("--memory-gb", type=float, metavar="GB", help="memory of one GPU in 10^9 bytes (default: its own)")
    command.add_argument("--hardware", type=Path, metavar="FILE.yaml", help="peaks, bandwidths and efficiencies that differ")
    command.add_argument("--layouts", type=int, default=5, metavar="K", help="layouts to propose, 0 for none (default: 5)")
    command.add_argument("--data", type=Path, nargs="+", default=[], metavar="FOLDER", help="packed data to measure rows from")
    command.add_argument("--images-per-row", help="pictures of a row, instead of what the data says", **number)
    command.add_argument("--patches-per-image", help="patches of a picture (default: 1024, 448 x 448 pixels)", **number)
    command.add_argument("--document-tokens", help="tokens of a document (default: measured, else 1024)", **number)
    command.add_argument("--trained-share", help="of a row's tokens, 0 to 1 (default: measured, else all)", **number)
    command.add_argument("--answer-tokens", help="of an answer in reinforcement learning (default: half the longest)", **number)
    command.add_argument("--json", type=Path, metavar="FILE", help="write the plan and the layouts there, too")


def _add_ranks(command: argparse.ArgumentParser) -> None:
    command.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine (outside torchrun)")
    command.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="R",
        help="with --ranks: when a rank dies, start all again from the newest checkpoint, at most R times (default: 0)",
    )


def _check(arguments: argparse.Namespace) -> int:
    if arguments.schema:
        return print_schema(TrainConfig)
    config = load_stage(arguments.configuration)
    print(to_yaml(config))
    print("\n".join(f"# {line}" for line in summarize(config).splitlines()))
    return OK


def _plan(arguments: argparse.Namespace) -> int:
    for name in ("gpus", "memory_gb", "images_per_row", "patches_per_image", "document_tokens", "answer_tokens", "layouts"):
        value, least = getattr(arguments, name), 0 if name in ("images_per_row", "layouts") else 1
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}: {value:g} is too small; give {least} or more")
    if (share := arguments.trained_share) is not None and not 0 < share <= 1:
        raise ConfigError(f"--trained-share: {share:g} is no share of the tokens; give a number above 0, at most 1")
    plan = importlib.import_module("megatron_glmv.plan.command")
    request = plan.PlanRequest(
        config=load_stage(arguments.configuration),
        hardware=plan.find_hardware(arguments.gpu, arguments.hardware, arguments.memory_gb),
        gpus=arguments.gpus,
        layouts=arguments.layouts,
        folders=arguments.data,
        assumed=plan.RowAssumptions(
            arguments.images_per_row, arguments.patches_per_image, arguments.document_tokens, arguments.trained_share
        ),
        answer_tokens=arguments.answer_tokens,
        json_file=arguments.json,
    )
    plan.run(request)
    return OK


def _train(arguments: argparse.Namespace) -> int:
    return _run_stage(arguments, "train", TrainConfig, "megatron_glmv.training.command")


def _rl(arguments: argparse.Namespace) -> int:
    if arguments.schema:
        return print_schema(RlConfig)
    return _run_stage(arguments, "rl", RlConfig, "megatron_glmv.rl.command")


def _run_stage(arguments: argparse.Namespace, command: str, root: type[StageConfig], module: str) -> int:
    """Run a stage on this rank, or start the ranks that run it."""
    config = load_stage(arguments.configuration, root)
    world = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
    if arguments.ranks is not None and arguments.ranks < 1:
        raise ConfigError(f"--ranks: {arguments.ranks} is not a number of ranks; give 1 or more")
    if world is not None and arguments.ranks not in (None, world):
        raise ConfigError(f"--ranks: torchrun has already started {world} ranks; leave --ranks out under torchrun")
    if arguments.restarts < 0 or (arguments.restarts and (world is not None or not arguments.ranks)):
        raise ConfigError("--restarts: takes 0 or more and goes with --ranks; under torchrun, give torchrun --max-restarts")
    ranks = world or arguments.ranks or 1
    words = [command, *arguments.configuration]
    if ranks < config.parallel.model_ranks:
        raise ConfigError(_too_few(config, ranks, words))
    config.data_parallel(ranks)
    if world is None and (ranks > 1 or arguments.restarts):
        # Ends with the exit code of the first rank that failed.
        launch = importlib.import_module("megatron_glmv.nodes.launch")
        return launch.start_ranks(ranks, words, config.run_folder, arguments.restarts)
    if config.parallel.needs_one_queue:
        # Read when CUDA starts, and so set before torch is loaded.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    importlib.import_module("megatron_glmv.run_folder.launch").end_with_launcher()
    with importlib.import_module("megatron_glmv.run_folder.stop_signals").listening():
        return importlib.import_module(module).run(config)


def _too_few(config: StageConfig, ranks: int, words: Sequence[str]) -> str:
    layout, needed = config.parallel, config.parallel.model_ranks
    return (
        f"parallel: tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context} needs {needed} ranks or a "
        f"multiple, here are {ranks}; run: torchrun --standalone --nproc-per-node {needed} -m megatron_glmv "
        f"{shlex.join(words)}"
    )
