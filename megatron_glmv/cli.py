"""``glmv``: parse the command line, call the command, turn errors into one line and an exit code.

The commands that compute live on lower floors and are imported by name only when they are called, so that ``glmv check``
and ``glmv --help`` answer without loading torch.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_glmv import __version__, cli_help
from megatron_glmv.config.base import Config, ConfigError, InputError, load, load_tree, to_yaml, validate
from megatron_glmv.config.rewards import RewardsConfig
from megatron_glmv.config.rl_stage import RlConfig
from megatron_glmv.config.summary import summarize
from megatron_glmv.config.training import StageConfig, TrainConfig

OK, FAILED, BAD_USAGE = 0, 1, 2


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
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="glmv",
        description="Train GLM-4.1V in tensor, pipeline, sequence, context and data parallel.",
        epilog=cli_help.EXAMPLES,
        formatter_class=plain,
    )
    parser.add_argument("--version", action="version", version=f"megatron-glmv {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "check", help="validate a configuration and show what it amounts to", description=cli_help.CHECK, formatter_class=plain
    )
    _add_configuration(command, required=False)
    command.add_argument(
        "--schema", action="store_true", help="print every key with its type, range and meaning as JSON schema"
    )
    command.set_defaults(call=_check)

    _add_plan(commands)

    command = commands.add_parser("train", help="train one stage", description=cli_help.TRAIN, formatter_class=plain)
    _add_configuration(command, required=True)
    _add_ranks(command)
    command.set_defaults(call=_train)

    command = commands.add_parser("rl", help="train one stage by rewards", description=cli_help.RL, formatter_class=plain)
    _add_configuration(command, required=False)
    _add_ranks(command)
    command.add_argument(
        "--schema", action="store_true", help="print every key with its type, range and meaning as JSON schema"
    )
    command.set_defaults(call=_rl)

    command = commands.add_parser(
        "status", help="what a run's folder says of it", description=cli_help.STATUS, formatter_class=plain
    )
    command.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="run_folder of the configuration")
    command.add_argument(
        "--exit-code", action="store_true", help="end with 0: finished, 3: can go on, 1: a restart would fail the same way"
    )
    command.set_defaults(call=_status)

    command = commands.add_parser(
        "stop", help="save a run and end it after the step it is in", description=cli_help.STOP, formatter_class=plain
    )
    command.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="run_folder of the configuration")
    command.set_defaults(call=_stop)

    _add_cluster(commands)
    _add_conversions(commands)
    _add_reward(commands)
    return parser


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "plan",
        help="memory, time and the best layouts of a stage, before it runs",
        description=cli_help.PLAN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_configuration(command, required=True)
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
    command.add_argument("--answer-tokens", help="of an answer in reinforcement learning (default: half the longest)", **number)
    command.add_argument("--json", type=Path, metavar="FILE", help="write the plan and the layouts there, too")
    command.set_defaults(call=_plan)


def _add_cluster(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plain = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(
        "preflight", help="check the nodes before a run", description=cli_help.PREFLIGHT, formatter_class=plain
    )
    command.add_argument("folder", type=Path, metavar="FOLDER", help="of this check, on a disk that all nodes share")
    _add_configuration(command, required=False)
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
    command.set_defaults(call=_preflight)

    command = commands.add_parser(
        "errors", help="what ended a job, first error on top", description=cli_help.ERRORS, formatter_class=plain
    )
    command.add_argument("folder", type=Path, metavar="LOG_FOLDER", help="RUN_FOLDER/logs, or a launch's folder in it")
    command.set_defaults(call=_errors)


def _add_conversions(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plain = argparse.RawDescriptionHelpFormatter
    checkpoint: dict[str, Any] = {"type": Path, "metavar": "CHECKPOINT"}
    folder: dict[str, Any] = {"type": Path, "metavar": "HF_FOLDER"}

    command = commands.add_parser(
        "import", help="write a Hugging Face folder as a checkpoint", description=cli_help.IMPORT, formatter_class=plain
    )
    command.add_argument("folder", help="folder to read: config.json, safetensors, tokenizer", **folder)
    command.add_argument("checkpoint", help="folder to write; must not exist", **checkpoint)
    command.add_argument("--no-verify", action="store_true", help="write without the proof")
    command.set_defaults(call=_import)

    command = commands.add_parser(
        "export", help="write a checkpoint as a Hugging Face folder", description=cli_help.EXPORT, formatter_class=plain
    )
    command.add_argument("checkpoint", help="a checkpoint, or a run folder: its newest", **checkpoint)
    command.add_argument("folder", help="folder to write; must not exist", **folder)
    command.add_argument(
        "--processor",
        type=Path,
        metavar="FOLDER",
        help="folder with tokenizer, chat template and image limits; left out, the one that the checkpoint was trained with",
    )
    command.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="GB", help="largest safetensors file, in 10^9 bytes (default: 5)"
    )
    command.add_argument("--adapter", action="store_true", help="write the adapters alone, as a PEFT folder")
    command.add_argument("--no-verify", action="store_true", help="write without the proof")
    command.set_defaults(call=_export)

    command = commands.add_parser(
        "verify",
        help="prove that a Hugging Face folder and a checkpoint are one model",
        description=cli_help.VERIFY,
        formatter_class=plain,
    )
    command.add_argument("folder", help="a released or exported folder", **folder)
    command.add_argument("checkpoint", help="a checkpoint, or a run folder: its newest", **checkpoint)
    command.add_argument("--report", type=Path, metavar="FILE.json", help="write the comparison there")
    command.set_defaults(call=_verify)


def _add_reward(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "reward",
        help="score answers in a file, with a table of each domain",
        description=cli_help.REWARD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    command.set_defaults(call=_reward)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes a list of positionals in one piece; here overrides may also follow an option: FILE --ranks 4 steps=5.
    if rest and (not hasattr(arguments, "configuration") or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.configuration += rest
    return arguments


def _add_configuration(command: argparse.ArgumentParser, *, required: bool) -> None:
    command.add_argument(
        "configuration",
        nargs="+" if required else "*",
        metavar="FILE.yaml | a.b=value",
        help="YAML files, merged left to right, then overrides",
    )


def _add_ranks(command: argparse.ArgumentParser) -> None:
    command.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine (outside torchrun)")
    command.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="R",
        help="with --ranks: when a rank dies, start all again from the newest checkpoint, at most R times (default: 0)",
    )


def _load(items: Sequence[str], root: type[StageConfig] | None = None) -> StageConfig:
    """The checked tree of a command line's files and overrides; without a root, the one that fits: RL has prompts."""
    overrides = [item for item in items if "=" in item and not Path(item).is_file()]
    files = [item for item in items if item not in overrides]
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


def _print_schema(root: type[Config]) -> int:
    print(json.dumps(root.model_json_schema(), indent=1, ensure_ascii=False))
    return OK


def _check(arguments: argparse.Namespace) -> int:
    if arguments.schema:
        return _print_schema(TrainConfig)
    config = _load(arguments.configuration)
    print(to_yaml(config))
    print("\n".join(f"# {line}" for line in summarize(config).splitlines()))
    return OK


def _plan(arguments: argparse.Namespace) -> int:
    for name in ("gpus", "memory_gb", "images_per_row", "patches_per_image", "document_tokens", "answer_tokens", "layouts"):
        value, least = getattr(arguments, name), 0 if name in ("images_per_row", "layouts") else 1
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}: {value:g} is too small; give {least} or more")
    plan = importlib.import_module("megatron_glmv.plan.command")
    request = plan.PlanRequest(
        config=_load(arguments.configuration),
        hardware=plan.find_hardware(arguments.gpu, arguments.hardware, arguments.memory_gb),
        gpus=arguments.gpus,
        layouts=arguments.layouts,
        folders=arguments.data,
        assumed=plan.RowAssumptions(arguments.images_per_row, arguments.patches_per_image, arguments.document_tokens),
        answer_tokens=arguments.answer_tokens,
        json_file=arguments.json,
    )
    plan.run(request)
    return OK


def _train(arguments: argparse.Namespace) -> int:
    return _run_stage(arguments, "train", TrainConfig, "megatron_glmv.training.command")


def _rl(arguments: argparse.Namespace) -> int:
    if arguments.schema:
        return _print_schema(RlConfig)
    return _run_stage(arguments, "rl", RlConfig, "megatron_glmv.rl.command")


def _run_stage(arguments: argparse.Namespace, command: str, root: type[StageConfig], module: str) -> int:
    """Run a stage on this rank, or start the ranks that run it."""
    config = _load(arguments.configuration, root)
    world = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
    if arguments.ranks is not None and arguments.ranks < 1:
        raise ConfigError(f"--ranks: {arguments.ranks} is not a number of ranks; give 1 or more")
    if world is not None and arguments.ranks not in (None, world):
        raise ConfigError(f"--ranks: torchrun has already started {world} ranks; leave --ranks out under torchrun")
    if arguments.restarts < 0 or (arguments.restarts and (world is not None or not arguments.ranks)):
        raise ConfigError("--restarts: takes 0 or more and goes with --ranks; under torchrun, give torchrun --max-restarts")
    ranks = world or arguments.ranks or 1
    if ranks < config.parallel.model_ranks:
        raise ConfigError(_too_few(config, ranks, [command, *arguments.configuration]))
    config.data_parallel(ranks)
    if world is None and (ranks > 1 or arguments.restarts):
        return _start_ranks(ranks, [command, *arguments.configuration], config.run_folder, arguments.restarts)
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


def _start_ranks(ranks: int, words: Sequence[str], run_folder: Path, restarts: int) -> int:
    """Start ranks on this machine and end with the exit code of the first that failed."""
    return importlib.import_module("megatron_glmv.parallel.launch").start_ranks(ranks, words, run_folder, restarts)


def _status(arguments: argparse.Namespace) -> int:
    status = importlib.import_module("megatron_glmv.run_folder.status")
    code = status.print_status(arguments.run_folder, for_script=arguments.exit_code)
    return code if arguments.exit_code else OK


def _stop(arguments: argparse.Namespace) -> int:
    print(importlib.import_module("megatron_glmv.run_folder.stop_file").request_stop(arguments.run_folder))
    return OK


def _preflight(arguments: argparse.Namespace) -> int:
    command = importlib.import_module("megatron_glmv.parallel.preflight_command")
    limits = importlib.import_module("megatron_glmv.parallel.preflight_report").Limits(
        arguments.slow, arguments.clock_s, arguments.memory_gb, arguments.disk_gb
    )
    ranks = arguments.ranks_per_node
    if ranks is not None and ranks < 1:
        raise ConfigError(f"--ranks-per-node: {ranks} is not a number of ranks; give 1 or more")
    if not arguments.judge:
        among = arguments.among.split(",") if arguments.among else []
        return command.run_measure(arguments.folder, among, ranks, arguments.timeout_s, limits)
    config = _load(arguments.configuration) if arguments.configuration else None

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
    print(importlib.import_module("megatron_glmv.parallel.rank_logs").summarize(arguments.folder))
    return OK


def _import(arguments: argparse.Namespace) -> int:
    return _conversion().run_import(arguments.folder, arguments.checkpoint, verify=not arguments.no_verify)


def _export(arguments: argparse.Namespace) -> int:
    if arguments.shard_gb <= 0:
        raise ConfigError(f"--shard-gb: {arguments.shard_gb:g} is not a size; give a number above 0")
    if arguments.adapter:
        return _conversion().run_adapter(arguments.checkpoint, arguments.folder)
    return _conversion().run_export(
        arguments.checkpoint,
        arguments.folder,
        processor=arguments.processor,
        max_shard_bytes=int(arguments.shard_gb * 1e9),
        verify=not arguments.no_verify,
    )


def _verify(arguments: argparse.Namespace) -> int:
    return _conversion().run_verify(arguments.folder, arguments.checkpoint, arguments.report)


def _reward(arguments: argparse.Namespace) -> int:
    if arguments.schema:
        return _print_schema(RewardsConfig)
    if arguments.file is None:
        raise ConfigError("no file of answers given; `glmv reward --help` says what its lines hold")
    overrides = [item for item in arguments.config if "=" in item and not Path(item).is_file()]
    try:
        config = load(RewardsConfig, [item for item in arguments.config if item not in overrides], overrides)
    except ConfigError as error:
        raise ConfigError(str(error).replace("glmv check --schema", "glmv reward --schema")) from None
    return importlib.import_module("megatron_glmv.rl.rewards.command").run(arguments.file, config, arguments.out)


def _conversion() -> Any:
    """The converting commands. They compute on the CPU in float32 wherever they run, so that a proof means the same."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return importlib.import_module("megatron_glmv.convert.command")


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
