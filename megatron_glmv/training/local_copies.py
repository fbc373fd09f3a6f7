"""Copies of a run's state on the nodes' own disks, between the checkpoints that all share.

Each rank writes what it holds itself, as it is: no exchange, no shared disk, and so of use to the same layout on the same nodes
alone. A restart goes on from them where every rank finds its own of one step; whatever is missing, damaged or of another layout
sends all ranks to the shared checkpoint.

    checkpoint.local_folder/RUN-ID/step_00000040/rank_0003/     meta.json (last), state.pt, config.yaml, and what the loop adds
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import shutil
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_glmv.config.base import to_yaml
from megatron_glmv.config.training import StageConfig
from megatron_glmv.run_folder import checkpoint_folder as folders
from megatron_glmv.run_folder.checkpoint_folder import CheckpointError
from megatron_glmv.run_folder.checkpoint_sums import find_damage
from megatron_glmv.training.checkpoint_faults import cause
from megatron_glmv.training.checkpoint_files import REMOVING
from megatron_glmv.training.checkpoint_ranks import first_fault, on_first_rank
from megatron_glmv.training.random_state import read_generators, restore_generators
from megatron_glmv.training.rank_state import read_rank, restore_rank, shapes_of
from megatron_glmv.training.state import TrainState
from megatron_glmv.training.watchdog import still_moving

KEPT = 2
"""Newest copies of a rank that stay: a rank may be killed in its save when the others have done theirs."""
_STATE = "state.pt"
_ID = "run_id"


class LocalCopies:
    """This rank's copies. Every method but `save` must be called on every rank.

    Args:
        config: the whole configuration, with ``checkpoint.local_folder``.
        models: this rank's chunks, unwrapped.
        optimizer: of these chunks.

    Raises:
        CheckpointError: the run folder cannot be written.
    """

    def __init__(self, config: StageConfig, models: Sequence[nn.Module], optimizer: MegatronOptimizer) -> None:
        assert config.checkpoint.local_folder is not None
        self._config, self._models, self._optimizer = config, models, optimizer
        # The id lies with the shared checkpoints: without those, copies of an earlier run of the same name mean nothing.
        name = f"{config.run_folder.resolve().name}-{_run_id(config)}"
        self._root, self._rank = config.checkpoint.local_folder / name, f"rank_{dist.get_rank():04d}"
        self._run = _describe(config)
        self.passed_over = ""
        """Why newer copies were not taken the last time; empty: there were none."""
        for left in self._root.glob(f"step_*/{self._rank}.*"):
            _remove(left)

    def save(self, state: TrainState, extra: Mapping[str, Any]) -> None:
        """Copy this rank's state; a disk that refuses costs the copy, and a warning.

        Args:
            state: counters.
            extra: file name -> tree of JSON to keep with it.
        """
        folder = self._folder(state.step)
        partial = folder.with_name(folder.name + folders.PARTIAL)
        tree = {"random": read_generators(), **read_rank(self._models, self._optimizer)}
        manifest = {"format": folders.FORMAT, "state": dataclasses.asdict(state), "saved_at": time.time(), "run": self._run}
        try:
            folders.open_partial(folder, 0)
            torch.save(tree, partial / _STATE)
            for name, content in extra.items():
                (partial / name).write_text(json.dumps(content), encoding="utf-8")
            folders.publish(partial, folder, manifest, to_yaml(self._config))
        except (CheckpointError, OSError, RuntimeError) as error:
            folders.give_up_room(partial)
            _remove(partial)
            print(f"glmv: warning: {folder}: no local copy ({cause(error)}); training goes on", file=sys.stderr, flush=True)
        for step in self._steps()[:-KEPT]:
            _remove(self._folder(step))

    def load(self, shared: Path | None) -> tuple[TrainState, Path] | None:
        """Continue from the newest copies that every rank has, if they are newer than the shared checkpoint.

        Args:
            shared: the newest complete one that this rank sees.

        Returns:
            The counters and this rank's copy; None: nothing was changed, and `passed_over` says why.
        """
        step = self._agree(-1 if shared is None else int(shared.name.removeprefix("step_")))
        if step is None:
            return None
        folder, tree, state, verify = self._folder(step), {}, TrainState(), self._config.checkpoint.verify
        try:
            manifest = folders.read_manifest(folder)
            state = TrainState(**manifest["state"])
            if not (fault := find_damage(folder, manifest, whole=verify, moved=still_moving)):
                tree = torch.load(folder / _STATE, map_location="cpu", weights_only=True, mmap=True)
                fits = shapes_of(tree) == shapes_of(read_rank(self._models, self._optimizer))
                fault = "" if fits else "holds other tensors"
        except (CheckpointError, OSError, RuntimeError, pickle.UnpicklingError) as error:
            fault = cause(error)
        self.passed_over = first_fault(f"rank {dist.get_rank()}: {folder} is damaged ({fault})" if fault else "")
        if self.passed_over:
            return None
        restore_rank(self._models, self._optimizer, tree)
        restore_generators(tree["random"])
        return state, folder

    def forget(self, after: int = -1) -> None:
        """Remove this rank's copies of later steps: the run has begun at `after`, or has ended."""
        for step in self._steps():
            if step > after:
                _remove(self._folder(step))
        with contextlib.suppress(OSError):
            self._root.rmdir()

    def _agree(self, shared: int) -> int | None:
        """The step of the newest copies that all ranks have and that are newer than any rank's shared checkpoint."""
        fitting: list[int] = []
        others: list[int] = []
        for step in self._steps():
            with contextlib.suppress(CheckpointError):
                (fitting if folders.read_manifest(self._folder(step)).get("run") == self._run else others).append(step)
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, (shared, fitting, others))
        shared = max(found for found, _, _ in said)
        newest = max((step for _, *lists in said for steps in lists for step in steps), default=-1)
        common = set.intersection(*({step for step in steps if step > shared} for _, steps, _ in said))
        self.passed_over = ""
        if common:
            return max(common)
        if newest > shared:
            rank, of_others = next((rank, steps) for rank, (_, own, steps) in enumerate(said) if newest not in own)
            what = "was written in another layout" if newest in of_others else "is not on its node"
            self.passed_over = f"rank {rank}'s of step {newest} {what}"
        return None

    def _folder(self, step: int) -> Path:
        return self._root / f"step_{step:08d}" / self._rank

    def _steps(self) -> list[int]:
        """Steps of this rank's complete copies, rising."""
        return sorted(
            int(m.parts[-3].removeprefix("step_")) for m in self._root.glob(f"step_*/{self._rank}/{folders.MANIFEST}")
        )


def _describe(config: StageConfig) -> dict[str, Any]:
    """What makes a rank's tensors what they are."""
    parts: Any = {"parallel": True, "precision": True, "megatron": True, "model": {"freeze", "lora"}}
    tree = config.model_dump(mode="json", include=parts)
    del tree["parallel"]["timeout_s"]
    whole = {"ranks": dist.get_world_size(), "shape": config.model.shape.model_dump(mode="json"), **tree}
    return json.loads(json.dumps(whole))


def _run_id(config: StageConfig) -> str:
    """The name that this run's copies have on every node; one that must not resume gets a new one."""
    path = config.run_folder / "checkpoints" / _ID

    def create() -> None:
        if config.checkpoint.resume and path.is_file():
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from error

    on_first_rank(create)
    answer = [path.read_text(encoding="utf-8").strip() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _remove(path: Path) -> None:
    """Remove a copy, or what is left of one; what is killed half-way must not look complete."""
    with contextlib.suppress(OSError):
        if path.is_file():
            path.unlink()
            return
        doomed = path if path.name.endswith((REMOVING, folders.PARTIAL)) else path.rename(path.with_name(path.name + REMOVING))
        shutil.rmtree(doomed)
        path.parent.rmdir()
