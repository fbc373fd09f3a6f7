"""Folders of checkpoints on disk: which are complete, how one becomes complete, which may go.

A checkpoint is written under ``step_00000100.partial`` and renamed when its manifest, the last file, is on the disk. So a
folder named ``step_00000100`` is whole, whatever killed the run; nothing here needs torch or a process group.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_glmv.config.base import InputError
from megatron_glmv.config.training import CheckpointConfig, TrainConfig

MANIFEST = "meta.json"
CONFIG = "config.yaml"
PARTIAL = ".partial"
REMOVING = ".removing"
FORMAT = 1
"""Number of the manifest's layout; another one is refused."""
_COMPLETE = re.compile(r"step_(\d{8,})")
_VERSIONED = ("megatron-glmv", "megatron-core", "torch", "transformer-engine")


class CheckpointError(InputError):
    """A checkpoint that cannot be written, read or used; the message is one line that names the folder and what to do."""


def folder_of(run_folder: Path, step: int) -> Path:
    """Folder of the complete checkpoint taken after `step` steps."""
    return run_folder / "checkpoints" / f"step_{step:08d}"


def complete_folders(run_folder: Path) -> dict[int, Path]:
    """Complete checkpoints of a run by step, oldest first."""
    found = {}
    try:
        entries = list((run_folder / "checkpoints").iterdir())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{run_folder / 'checkpoints'}: cannot be listed ({error.strerror})") from error
    for entry in entries:
        match = _COMPLETE.fullmatch(entry.name)
        if match and (entry / MANIFEST).is_file():
            found[int(match[1])] = entry
    return dict(sorted(found.items()))


def latest(run_folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; None without one."""
    return next(reversed(complete_folders(run_folder).values()), None)


def find(path: Path) -> Path:
    """The checkpoint that a user's path means: a checkpoint's own folder, or the newest one of a run's folder.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    if (path / MANIFEST).is_file():
        return path
    newest = latest(path)
    if newest is None:
        raise CheckpointError(f"{path}: holds no complete checkpoint; name a run's folder or one step_... folder of it")
    return newest


def clean_leftovers(run_folder: Path) -> list[Path]:
    """Remove what a killed save or a killed removal left; returns what was removed."""
    folder = run_folder / "checkpoints"
    leftovers = [found for ending in (PARTIAL, REMOVING) for found in folder.glob(f"step_*{ending}")]
    for folder in leftovers:
        shutil.rmtree(folder, ignore_errors=True)
    return leftovers


def open_partial(folder: Path, needed_bytes: int) -> Path:
    """Create the empty folder that a save writes into.

    Args:
        folder: name of the complete checkpoint.
        needed_bytes: what the save is going to write.

    Raises:
        CheckpointError: the folder cannot be created, or the disk has not enough room.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
    except OSError as error:
        raise CheckpointError(f"{partial}: cannot be created ({error.strerror}); older checkpoints are untouched") from error
    if free < needed_bytes:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{folder}: needs {needed_bytes / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; make room or lower "
            "checkpoint.keep; older checkpoints are untouched"
        )
    return partial


def publish(partial: Path, folder: Path, manifest: Mapping[str, Any], config_yaml: str) -> None:
    """Make a fully written folder a complete checkpoint: configuration, manifest last, everything on the disk, rename.

    Raises:
        CheckpointError: the disk refuses.
    """
    try:
        (partial / CONFIG).write_text(config_yaml, encoding="utf-8")
        for file in sorted(partial.iterdir()):
            _sync(file)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _sync(partial / MANIFEST)
        _sync(partial)
        partial.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be completed ({error.strerror}); older checkpoints are untouched") from error


def retire(run_folder: Path, config: CheckpointConfig) -> list[Path]:
    """Remove complete checkpoints beyond the newest `config.keep`; returns what was removed."""
    complete = complete_folders(run_folder)
    kept_for_ever = {step for step in complete if config.keep_every_steps and step % config.keep_every_steps == 0}
    removed = []
    for step in list(complete)[: -config.keep]:
        if step in kept_for_ever:
            continue
        # Renamed first: a removal that is killed half-way must not leave a folder that looks complete.
        doomed = complete[step].rename(complete[step].with_name(complete[step].name + REMOVING))
        shutil.rmtree(doomed, ignore_errors=True)
        removed.append(complete[step])
    return removed


def describe_run(config: TrainConfig, layout: Mapping[str, int]) -> dict[str, Any]:
    """The part of a manifest that does not change during a run."""
    return {
        "format": FORMAT,
        "layout": dict(layout),
        "shape": config.model.shape.model_dump(mode="json"),
        "dtype": config.precision.dtype,
        "distributed_optimizer": config.parallel.distributed_optimizer,
        "freeze": sorted(config.model.freeze),
        "lora": _lora(config),
        "versions": {name: version for name in _VERSIONED if (version := _version(name))},
        "commit": _commit(),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """A complete checkpoint's manifest.

    Raises:
        CheckpointError: unreadable, or of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); remove {folder} to resume from the one before it") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint manifest of format {FORMAT}; it was written by another version")
    return manifest


def check_architecture(folder: Path, manifest: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        CheckpointError: names the first number that differs.
    """
    saved = dict(_flatten(manifest["shape"]))
    wanted = dict(_flatten(config.model.shape.model_dump(mode="json")))
    for key in wanted | saved:
        if saved.get(key) != wanted.get(key):
            raise CheckpointError(
                f"{folder}: checkpoint of another architecture: {key} is {saved.get(key)} in the checkpoint and "
                f"{wanted.get(key)} in the configuration; use the model it was saved with, or another run_folder"
            )


def check_resumable(folder: Path, manifest: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuse to continue a run whose optimizer state has another form.

    Raises:
        CheckpointError: names the key that differs.
    """
    for key, name, wanted in (
        ("dtype", "precision.dtype", config.precision.dtype),
        ("distributed_optimizer", "parallel.distributed_optimizer", config.parallel.distributed_optimizer),
        ("freeze", "model.freeze", sorted(config.model.freeze)),
        ("lora", "model.lora", _lora(config)),
    ):
        if (saved := manifest.get(key)) != wanted:
            raise CheckpointError(
                f"{folder}: {name} was {saved} when it was saved and is {wanted} now; a run continues with the same, "
                "a new run (another run_folder) takes the weights with checkpoint.start_from"
            )


def starts_adapters(folder: Path, manifest: Mapping[str, Any], config: TrainConfig) -> bool:
    """Whether a run that takes only the weights of a checkpoint takes adapters from it, too.

    Returns:
        True where the checkpoint has the run's own adapters; False where it has none.

    Raises:
        CheckpointError: its adapters are not the run's; its weights alone would be another model than the one that was trained.
    """
    saved = manifest.get("lora")
    if saved is not None and saved != _lora(config):
        raise CheckpointError(
            f"{folder}: model.lora was {saved} when it was saved and is {_lora(config)} now; take the same, or start from the "
            "merged model: glmv export, then model.hf_folder"
        )
    return saved is not None


def _lora(config: TrainConfig) -> dict[str, Any] | None:
    return None if config.model.lora is None else config.model.lora.model_dump(mode="json")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree, when this package runs from one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
