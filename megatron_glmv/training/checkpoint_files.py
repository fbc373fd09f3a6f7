"""The checkpoints of a run: what each says of the run, which run may continue from it, which may go."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_glmv.config.training import CheckpointConfig, StageConfig
from megatron_glmv.run_folder.checkpoint_folder import FORMAT, PARTIAL, ROOM, CheckpointError, complete_folders, origin

REMOVING = ".removing"


@dataclass(frozen=True)
class SaveReport:
    """What one checkpoint, or one local copy on all ranks, cost."""

    step: int
    stall_s: float
    """Training stood still for it; for a copy, on the rank that took longest."""
    seconds: float
    """From the beginning of the save until it was complete."""
    is_copy: bool = False


def clean_leftovers(run_folder: Path) -> list[Path]:
    """Remove what a killed save or a killed removal left; returns what was removed."""
    folder = run_folder / "checkpoints"
    leftovers = [found for ending in (PARTIAL, REMOVING) for found in folder.glob(f"step_*{ending}")]
    for found in leftovers:
        shutil.rmtree(found, ignore_errors=True)
    for room in folder.glob(f"step_*{ROOM}"):
        room.unlink(missing_ok=True)
    return leftovers


def retire(run_folder: Path, config: CheckpointConfig) -> list[Path]:
    """Remove complete checkpoints beyond the newest `config.keep`; returns what was removed.

    Raises:
        CheckpointError: the disk refuses.
    """
    complete = complete_folders(run_folder)
    kept_for_ever = {step for step in complete if config.keep_every_steps and step % config.keep_every_steps == 0}
    removed = []
    for step in list(complete)[: -config.keep]:
        if step in kept_for_ever:
            continue
        # Renamed first: a removal that is killed half-way must not leave a folder that looks complete.
        try:
            doomed = complete[step].rename(complete[step].with_name(complete[step].name + REMOVING))
        except OSError as error:
            raise CheckpointError(f"{complete[step]}: cannot be removed ({error.strerror})") from error
        shutil.rmtree(doomed, ignore_errors=True)
        removed.append(complete[step])
    return removed


def describe_run(config: StageConfig, layout: Mapping[str, int]) -> dict[str, Any]:
    """The part of a manifest that does not change during a run."""
    return {
        "format": FORMAT,
        "layout": dict(layout),
        "shape": config.model.shape.model_dump(mode="json"),
        "dtype": config.precision.dtype,
        "distributed_optimizer": config.parallel.distributed_optimizer,
        "freeze": sorted(config.model.freeze),
        "lora": _lora(config),
        **origin(),
    }


def check_resumable(folder: Path, manifest: Mapping[str, Any], config: StageConfig) -> None:
    """Refuse to continue a run whose optimizer state has another form.

    Raises:
        CheckpointError: names the key that differs, or the checkpoint holds weights alone.
    """
    if "distributed_optimizer" not in manifest:
        raise CheckpointError(
            f"{folder}: holds imported weights and no optimizer; name it as checkpoint.start_from of another run_folder"
        )
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


def starts_adapters(folder: Path, manifest: Mapping[str, Any], config: StageConfig) -> bool:
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


def _lora(config: StageConfig) -> dict[str, Any] | None:
    return None if config.model.lora is None else config.model.lora.model_dump(mode="json")
