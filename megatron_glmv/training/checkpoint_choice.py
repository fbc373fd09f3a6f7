"""Which checkpoint a run goes on from: the newest one that is whole, chosen by all ranks together.

One that is damaged is set aside under another name, never removed, and the one before it is taken.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_glmv.run_folder import checkpoint_folder as folders
from megatron_glmv.run_folder.checkpoint_folder import CheckpointError
from megatron_glmv.run_folder.checkpoint_sums import find_damage
from megatron_glmv.run_folder.events import EventLog
from megatron_glmv.training.checkpoint_ranks import check_same_everywhere, first_fault, on_first_rank


def newest_whole(run_folder: Path, events: EventLog, *, verify: bool) -> Path | None:
    """The newest checkpoint of a run whose files are what was written; every rank must call it.

    Args:
        run_folder: of the run.
        events: get a line about every one that is set aside.
        verify: compare checksums, not sizes alone.

    Returns:
        Its folder; None when the run has no checkpoint yet.

    Raises:
        CheckpointError: all are damaged; a run does not begin anew without being told to.
    """
    check_same_everywhere(folders.latest(run_folder))
    while True:
        folder = _first_ranks(folders.latest(run_folder))
        if folder is None:
            if damaged := folders.damaged_folders(run_folder):
                raise CheckpointError(
                    f"{damaged[-1]}: no checkpoint of this run is whole; repair one and give it its name back, or begin anew "
                    "in another run_folder"
                )
            return None
        fault = damage_of(folder, verify=verify)
        if not fault:
            return folder

        def set_aside(folder: Path = folder, fault: str = fault) -> None:
            aside = folders.set_aside(folder)
            events.record(
                "damaged", step_of(folder), f"{folder}: damaged ({fault}); set aside as {aside.name}", {"fault": fault}
            )

        on_first_rank(set_aside)


def damage_of(folder: Path, *, verify: bool) -> str:
    """What is wrong with a checkpoint; empty: nothing. The ranks share the reading; every rank must call it."""
    try:
        manifest = folders.read_manifest(folder)
        fault = find_damage(folder, manifest, part=dist.get_rank(), parts=dist.get_world_size(), whole=verify)
    except CheckpointError as error:
        fault = str(error)
    return first_fault(fault)


def step_of(folder: Path) -> int:
    """Steps done when a checkpoint of a run was taken, from its name."""
    return int(folder.name.removeprefix("step_"))


def _first_ranks(folder: Path | None) -> Path | None:
    """Rank 0's answer on every rank: a network disk may still show the others a name that is gone."""
    answer = [folder]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]
