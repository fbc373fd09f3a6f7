"""The commands between checkpoints and Hugging Face folders: import, export, verify."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path
from typing import Any

from megatron_glmv.cli import descriptions
from megatron_glmv.cli.arguments import Commands, add_command
from megatron_glmv.config.base import ConfigError


def add_conversion_commands(commands: Commands) -> None:
    """Add them to the command line."""
    summary = "write a Hugging Face folder as a checkpoint"
    command = add_command(commands, "import", _import, summary=summary, description=descriptions.IMPORT)
    _add_folder(command, "folder to read: config.json, safetensors, tokenizer")
    _add_checkpoint(command, "folder to write; must not exist")
    _add_no_verify(command)

    summary = "write a checkpoint as a Hugging Face folder"
    command = add_command(commands, "export", _export, summary=summary, description=descriptions.EXPORT)
    _add_checkpoint(command, "a checkpoint, or a run folder: its newest")
    _add_folder(command, "folder to write; must not exist")
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
    _add_no_verify(command)

    summary = "prove that a Hugging Face folder and a checkpoint are one model"
    command = add_command(commands, "verify", _verify, summary=summary, description=descriptions.VERIFY)
    _add_folder(command, "a released or exported folder")
    _add_checkpoint(command, "a checkpoint, or a run folder: its newest")
    command.add_argument("--report", type=Path, metavar="FILE.json", help="write the comparison there")


def _add_folder(command: argparse.ArgumentParser, meaning: str) -> None:
    command.add_argument("folder", type=Path, metavar="HF_FOLDER", help=meaning)


def _add_checkpoint(command: argparse.ArgumentParser, meaning: str) -> None:
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=meaning)


def _add_no_verify(command: argparse.ArgumentParser) -> None:
    command.add_argument("--no-verify", action="store_true", help="write without the proof")


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


def _conversion() -> Any:
    """What converts. It computes on the CPU in float32 wherever it runs, so that a proof means the same."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return importlib.import_module("megatron_glmv.convert.command")
