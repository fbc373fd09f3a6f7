"""The folder of one checkpoint: how it becomes complete, how it is found, and what its manifest says.

A checkpoint is written under ``NAME.partial`` and renamed when its manifest, the last file, is on the disk. So a folder with a
manifest is whole, whatever killed the writer; nothing here needs torch or a process group.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_glmv.config.base import InputError, validate
from megatron_glmv.config.model import ModelShape
from megatron_glmv.run_folder.checkpoint_sums import FILES, OWN_SUM, manifest_sum, sum_file

MANIFEST = "meta.json"
CONFIG = "config.yaml"
PARTIAL = ".partial"
DAMAGED = ".damaged"
"""Ending of a checkpoint that was set aside; a number follows where there are several."""
FORMAT = 1
"""Number of the manifest's layout; another one is refused."""
ROOM = ".room"
_ROOM_BYTES = 4 * 2**20
"""Held free for the small files that are written last, whose failure one rank alone would meet."""
_COMPLETE = re.compile(r"step_(\d{8,})")
_VERSIONED = ("megatron-glmv", "megatron-core", "torch", "transformers", "transformer-engine")


class CheckpointError(InputError):
    """A checkpoint that cannot be written, read or used; the message is one line that names the folder and what to do."""


class DamagedError(CheckpointError):
    """A checkpoint that was read and is not what was written."""


class DiskError(Exception):
    """A disk that does not answer a rank, or not as it answers another: no word about the checkpoint.

    No InputError, which no start repairs: the next one may find the disk well, or be on another node.
    """


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


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that it counts no longer; nothing is deleted. Returns its new name."""
    number, aside = 1, folder.with_name(folder.name + DAMAGED)
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}{DAMAGED}.{number}")
    return folder.rename(aside)


def damaged_folders(run_folder: Path) -> list[Path]:
    """Checkpoints of a run that were set aside."""
    return sorted((run_folder / "checkpoints").glob(f"step_*{DAMAGED}*"))


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


def open_partial(folder: Path, needed_bytes: int, last_bytes: int = 0) -> Path:
    """Create the empty folder that a save writes into.

    Args:
        folder: name of the complete checkpoint.
        needed_bytes: what the save is going to write.
        last_bytes: of what is then written by one rank, beside the small files of every checkpoint; held free.

    Raises:
        CheckpointError: the folder cannot be created, or the disk has not enough room.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        with _room_of(partial).open("wb") as room:
            os.posix_fallocate(room.fileno(), 0, _ROOM_BYTES + last_bytes)
    except OSError as error:
        give_up_room(partial)
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{partial}: cannot be created ({error.strerror}); older checkpoints are untouched") from error
    needed_bytes += _ROOM_BYTES + last_bytes
    if free < needed_bytes:
        give_up_room(partial)
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{folder}: needs {needed_bytes / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; make room or lower "
            "checkpoint.keep; older checkpoints are untouched"
        )
    return partial


def give_up_room(partial: Path) -> None:
    """Free what was held for the files that are written last."""
    with contextlib.suppress(OSError):
        _room_of(partial).unlink()


def _room_of(partial: Path) -> Path:
    """Beside the folder: Megatron takes a folder that is not empty for one that was left."""
    return partial.with_name(partial.name.removesuffix(PARTIAL) + ROOM)


def publish(
    partial: Path,
    folder: Path,
    manifest: Mapping[str, Any],
    config_yaml: str,
    sums: Mapping[str, tuple[int, int]] | None = None,
) -> None:
    """Make a fully written folder a complete checkpoint: configuration, manifest last, everything on the disk, rename.

    Args:
        partial: where it was written.
        folder: its name.
        manifest: what it says of itself; sizes and checksums of all files are added.
        config_yaml: the resolved configuration.
        sums: those that are known already; the others are read here.

    Raises:
        CheckpointError: the disk refuses.
    """
    known = sums or {}
    try:
        give_up_room(partial)
        (partial / CONFIG).write_text(config_yaml, encoding="utf-8")
        found = sorted(partial.iterdir())
        for file in found:
            sync(file)
        files = {file.name: known.get(file.name) or sum_file(file) for file in found if file.is_file()}
        whole = json.loads(json.dumps({**manifest, FILES: files}))
        whole[OWN_SUM] = manifest_sum(whole)
        (partial / MANIFEST).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        sync(partial / MANIFEST)
        sync(partial)
        partial.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be completed ({error.strerror}); older checkpoints are untouched") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """A complete checkpoint's manifest.

    Raises:
        DamagedError: it is not what was written.
        CheckpointError: of another format, or unreadable, which its cause (an OSError) says.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); is {folder} one complete checkpoint?") from error
    except ValueError as error:
        raise DamagedError(f"{path}: not JSON ({error}); rename {folder} to resume from the one before it") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint manifest of format {FORMAT}; it was written by another version")
    if manifest.get(OWN_SUM, manifest_sum(manifest)) != manifest_sum(manifest):
        raise DamagedError(f"{path}: not what was written, its checksum differs")
    return manifest


def check_architecture(folder: Path, manifest: Mapping[str, Any], shape: ModelShape) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        CheckpointError: names the first number that differs.
    """
    saved, wanted = (dict(_flatten(found.model_dump(mode="json"))) for found in (shape_of(folder, manifest), shape))
    for key in wanted:
        if saved[key] != wanted[key]:
            raise CheckpointError(
                f"{folder}: checkpoint of another architecture: {key} is {saved[key]} in the checkpoint and {wanted[key]} in "
                "the configuration; use the model it was saved with, or another run_folder"
            )


def shape_of(folder: Path, manifest: Mapping[str, Any]) -> ModelShape:
    """The architecture that a manifest names.

    Raises:
        CheckpointError: the manifest holds no architecture.
    """
    if "shape" not in manifest:
        raise CheckpointError(f"{folder / MANIFEST}: names no architecture")
    return validate(ModelShape, manifest["shape"], where=str(folder / MANIFEST))


def origin() -> dict[str, Any]:
    """The part of a manifest that says what wrote it: versions of the packages and the source tree's commit."""
    return {"versions": {name: version for name in _VERSIONED if (version := _version(name))}, "commit": _commit()}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def sync(path: Path) -> None:
    """Wait until a file or a folder's list of files is on the disk."""
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
