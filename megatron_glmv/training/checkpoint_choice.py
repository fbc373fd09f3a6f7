"""Which checkpoint a run goes on from: the newest one that is whole, chosen by all ranks together.

One that is damaged is set aside under another name, never removed, and the one before it is taken. Damage is what was read, by
rank 0 too, and is not what was written. A disk that does not answer one node, or not as it answers rank 0, ends the start and
changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_glmv.run_folder import checkpoint_folder as folders
from megatron_glmv.run_folder.checkpoint_folder import CheckpointError, DamagedError, DiskError
from megatron_glmv.run_folder.checkpoint_sums import find_damage
from megatron_glmv.run_folder.events import EventLog
from megatron_glmv.training.checkpoint_ranks import (
    check_same_everywhere,
    first_fault,
    gather_faults,
    on_every_rank,
    on_first_rank,
    together,
)


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
        DiskError: as for `damage_of`.
    """
    check_same_everywhere(on_every_rank(lambda: folders.latest(run_folder)))
    while True:
        # Rank 0's answer: a network disk may still show the others a name that is gone.
        folder = on_first_rank(lambda: folders.latest(run_folder))
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
    """What is wrong with a checkpoint; empty: nothing. The ranks share the reading; every rank must call it.

    Args:
        folder: the checkpoint.
        verify: compare checksums, not sizes alone.

    Raises:
        DiskError: a rank cannot read it, or misses in it what rank 0 finds.
        CheckpointError: it was written by another version.
    """

    def look(part: int, moved: Callable[[], None]) -> str:
        """The damage in one rank's share of the files, as this rank reads them; empty: none."""
        parts = dist.get_world_size()
        try:
            return find_damage(folder, folders.read_manifest(folder), part=part, parts=parts, whole=verify, moved=moved)
        except DamagedError as error:
            return str(error)

    own = on_every_rank(lambda: together(lambda moved: look(dist.get_rank(), moved)))
    found = gather_faults(own)

    def look_again(moved: Callable[[], None]) -> str:
        """On rank 0: the first damage that it finds itself in the files in which another rank did."""
        if dist.get_rank():
            return ""
        return own or next((again for rank, fault in enumerate(found) if fault and (again := look(rank, moved))), "")

    if not any(found):
        return ""
    if fault := first_fault(on_every_rank(lambda: together(look_again))):
        return fault

    def tell() -> None:
        if own:
            raise DiskError(f"{folder}: {own} as this rank reads it, and not as rank 0 does")

    on_every_rank(tell)
    return ""


def step_of(folder: Path) -> int:
    """Steps done when a checkpoint of a run was taken, from its name."""
    return int(folder.name.removeprefix("step_"))
