"""Saving and resuming a run with Megatron's distributed checkpoints, in any parallel layout.

Weights and optimizer state are stored as whole tensors cut into chunks, so another tensor, pipeline, context or data layout
reads the chunks it needs. Random states belong to one layout and are used only in the same one.

Source: megatron-core 0.16.1, dist_checkpointing/serialization.py and optimizer/distrib_optimizer.py ("fully_reshardable").
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import (
    StrictHandling,
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model

from megatron_glmv.config.base import to_yaml
from megatron_glmv.config.training import StageConfig
from megatron_glmv.convert.checkpoint_tensors import read_index
from megatron_glmv.model.lora import has_adapter
from megatron_glmv.run_folder import checkpoint_folder as folders
from megatron_glmv.run_folder.checkpoint_folder import CheckpointError
from megatron_glmv.run_folder.checkpoint_sums import Sums
from megatron_glmv.run_folder.events import EventLog
from megatron_glmv.training import checkpoint_files as files
from megatron_glmv.training.checkpoint_choice import damage_of, newest_whole
from megatron_glmv.training.checkpoint_faults import FAILURES, unreadable, unwritable
from megatron_glmv.training.checkpoint_files import SaveReport
from megatron_glmv.training.checkpoint_ranks import (
    check_same_everywhere,
    gather_sums,
    on_all_ranks,
    on_every_rank,
    on_first_rank,
    over_ranks,
    sum_over_ranks,
)
from megatron_glmv.training.checkpoint_writer import CheckpointWrite
from megatron_glmv.training.local_copies import LocalCopies
from megatron_glmv.training.optimizer import gather_weights
from megatron_glmv.training.random_state import read_generators, restore_generators
from megatron_glmv.training.rank_state import STATISTICS
from megatron_glmv.training.state import TrainState


@dataclasses.dataclass
class _Pending:
    """A save whose files are being written."""

    write: CheckpointWrite
    partial: Path
    folder: Path
    state: TrainState
    extra: dict[str, bytes]
    began: float
    stalled_before_s: float


class Checkpointer:
    """Saves, resumes and tidies the checkpoints of one run. Every method must be called on every rank.

    Args:
        config: the whole configuration; saved beside every checkpoint.
        model_chunks: Megatron's DistributedDataParallel wrappers, one per virtual pipeline chunk.
        optimizer: of these chunks.
        events: where failed saves and damaged checkpoints are recorded; None: said on the first rank.

    Raises:
        CheckpointError: the run folder holds checkpoints and ``checkpoint.resume`` is off.
    """

    def __init__(
        self,
        config: StageConfig,
        model_chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        events: EventLog | None = None,
    ) -> None:
        self._config = config
        self._chunks = model_chunks
        # The wrappers' state has other prefixes than the model's own, which another layout or precision must find again.
        self._models = [unwrap_model(chunk) for chunk in model_chunks]
        self._optimizer = optimizer
        self._events = events or EventLog(config.run_folder, reports=dist.get_rank() == 0)
        self._pending: _Pending | None = None
        self._failures = 0
        self._began = 0.0, 0.0
        self._stall_s = 0.0  # that training has stood still for saves so far
        self._done: _Pending | None = None
        self._reports: list[SaveReport] = []
        self._run = files.describe_run(config, _layout(config))
        self._save_strategy = get_default_save_sharded_strategy()
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if dist.get_world_size(replicas) > 1:
            self._save_strategy = FullyParallelSaveStrategyWrapper(self._save_strategy, replicas, do_cache_distribution=True)
        self._validated = False
        newest = on_every_rank(lambda: folders.latest(config.run_folder))
        if newest is not None and not config.checkpoint.resume:
            raise CheckpointError(
                f"{newest}: run_folder holds checkpoints of an earlier run; set checkpoint.resume or use another run_folder"
            )
        on_first_rank(lambda: files.clean_leftovers(config.run_folder))
        self._copies = LocalCopies(config, self._models, optimizer) if config.checkpoint.local_folder is not None else None
        self.origin: Path | None = None
        """The folder that the run goes on from: a shared checkpoint, or this rank's local copy."""

    def save(self, state: TrainState, extra: Mapping[str, Any] | None = None, *, must: bool = False) -> None:
        """Save after `state.step` steps; with ``checkpoint.asynchronous`` only the copying is done when this returns.

        A save that fails leaves the older checkpoints as they are, and the run goes on: it is recorded.

        Args:
            state: counters.
            extra: file name -> tree of JSON to keep in the checkpoint; rank 0's is written.
            must: the run ends after it, so a failure is an error.

        Raises:
            CheckpointError: the disk is full or refuses, the ``checkpoint.max_failures``-th time in a row, or `must`.
        """
        self._attempt(self._finish, state.step, must=False)
        self._began = time.perf_counter(), self._stall_s
        self._attempt(lambda: self._save(state, extra or {}), state.step, must=must)

    def _attempt(self, action: Callable[[], None], step: int, *, must: bool) -> None:
        """Do a part of a save; count and record a failure, which all ranks see alike."""
        started = time.perf_counter()
        try:
            action()
        except CheckpointError as error:
            self._failures += 1
            on_first_rank(lambda: files.clean_leftovers(self._config.run_folder))
            limit = self._config.checkpoint.max_failures
            if must or self._failures >= limit:
                raise
            text = f"{error}; training goes on and tries again at the next save (failure {self._failures} of {limit} in a row)"
            self._events.record("unsaved", step, text)
        finally:
            now = time.perf_counter()
            self._stall_s += now - started
            done, self._done = self._done, None
            if done is not None:
                self._reports.append(SaveReport(done.state.step, self._stall_s - done.stalled_before_s, now - done.began))

    def _save(self, state: TrainState, extra: Mapping[str, Any]) -> None:
        folder = folders.folder_of(self._config.run_folder, state.step)
        if folders.latest(self._config.run_folder) == folder:
            return  # the one this run resumed from, or saved just now
        gather_weights(self._chunks)
        self._create_moments()
        self._align_optimizer_steps()
        tree = self._state_dict(is_loading=False)
        tree["random"] = self._random_shard(read_generators())
        size = sum_over_ranks(sum(s.data.nbytes for s in nested_values(tree) if _is_written_here(s)))
        partial = folder.with_name(folder.name + folders.PARTIAL)
        written = {name: json.dumps(tree).encode() for name, tree in extra.items()}
        on_first_rank(lambda: folders.open_partial(folder, size, sum(map(len, written.values()))))
        try:
            request = dist_checkpointing.save(
                tree,
                str(partial),
                self._save_strategy,
                validate_access_integrity=not self._validated,
                async_sharded_save=True,
            )
        except FAILURES as error:
            raise unwritable(folder, error) from error
        self._validated = True
        write = CheckpointWrite(request, background=self._config.checkpoint.asynchronous)
        self._pending = _Pending(write, partial, folder, dataclasses.replace(state), written, *self._began)
        if not self._config.checkpoint.asynchronous:
            self._finish()

    def poll(self) -> None:
        """Complete a background save if all ranks have written; cheap, meant for every step.

        Raises:
            CheckpointError: as for `save`.
        """
        if self._pending is not None and on_all_ranks(self._pending.write.is_written()):
            self._attempt(self._finish, self._pending.state.step, must=False)

    def save_local(self, state: TrainState, extra: Mapping[str, Any] | None = None) -> None:
        """Copy each rank's state to its node's own disk, where the configuration names one (``checkpoint.local_folder``).

        Args:
            state: counters.
            extra: as for `save`; every rank's is written.
        """
        if self._copies is None:
            return
        began = time.perf_counter_ns()
        gather_weights(self._chunks)
        self._copies.save(state, extra or {})
        # The next step waits for the slowest disk in any case.
        stall_s = over_ranks(time.perf_counter_ns() - began, dist.ReduceOp.MAX) / 1e9
        self._reports.append(SaveReport(state.step, stall_s, stall_s, is_copy=True))

    def take_reports(self) -> list[SaveReport]:
        """What each checkpoint and local copy cost that has become complete since the last call."""
        reports, self._reports = self._reports, []
        return reports

    def close(self) -> None:
        """Wait for a background save and complete it.

        Raises:
            CheckpointError: it failed, which only matters to a run that ends with it.
        """
        if self._pending is not None:
            self._attempt(self._finish, self._pending.state.step, must=True)
        if self._copies is not None:
            self._copies.forget()

    def load_latest(self) -> TrainState | None:
        """Continue from the newest whole checkpoint of the run folder: weights, optimizer, random states, counters.

        Newer local copies are taken instead, if every rank has its own.

        Returns:
            The counters, or None when there is no checkpoint.

        Raises:
            CheckpointError: all are damaged, or it is of another architecture, precision or kind of optimizer.
            DiskError: a rank cannot read it.
        """
        copied = self._copies.load(folders.latest(self._config.run_folder)) if self._copies is not None else None
        state, self.origin = copied or self._load_shared()
        if self._copies is not None:
            self._copies.forget(after=0 if state is None else state.step)
        return state

    def describe_origin(self) -> str:
        """Where the run goes on from, and why not from its local copies, for people; empty: it begins."""
        passed_over = self._copies.passed_over if self._copies is not None else ""
        return f"{self.origin or ''}{f' (not from the local copies: {passed_over})' if passed_over else ''}"

    def _load_shared(self) -> tuple[TrainState | None, Path | None]:
        folder = newest_whole(self._config.run_folder, self._events, verify=self._config.checkpoint.verify)
        if folder is None:
            return None, None
        manifest = folders.read_manifest(folder)
        folders.check_architecture(folder, manifest, self._config.model.shape)
        files.check_resumable(folder, manifest, self._config)
        groups = [{k: v for k, v in g.items() if k not in ("params", "step")} for g in self._optimizer.param_groups]
        tree = self._state_dict(is_loading=True)
        same_layout = manifest["layout"] == self._run["layout"]
        if same_layout:
            tree["random"] = self._random_shard(None)
        loaded = _load(tree, folder)
        self._load_model(loaded, folder)
        try:
            self._optimizer.load_state_dict(loaded["optimizer"])
        except FAILURES as error:
            raise unreadable(folder, error) from error
        # The configuration rules over rates and decay; of the groups, the checkpoint rules over `step` alone.
        for group, own in zip(self._optimizer.param_groups, groups, strict=True):
            group.update(own)
        self._align_optimizer_steps()
        if same_layout:
            restore_generators(loaded["random"])
        return TrainState(**manifest["state"]), folder

    def return_to_latest(self) -> TrainState | None:
        """Go back to the newest whole checkpoint within a run; one that is being written is completed first.

        Returns:
            As `load_latest`.

        Raises:
            CheckpointError: as for `load_latest`.
        """
        if self._pending is not None:
            self._attempt(self._finish, self._pending.state.step, must=False)
        gather_weights(self._chunks)
        return self.load_latest()

    def load_weights_only(self, path: Path) -> None:
        """Start from the weights of another run (``checkpoint.start_from``), in any layout and precision.

        A run with adapters starts them anew on a checkpoint without any.

        Args:
            path: a run's folder or one complete checkpoint.

        Raises:
            CheckpointError: no checkpoint there, damaged, or of another architecture, or with other adapters.
        """
        folder = folders.find(path)
        check_same_everywhere(folder)
        if fault := damage_of(folder, verify=self._config.checkpoint.verify):
            raise CheckpointError(f"{folder}: damaged ({fault}); take another checkpoint, or write this one again")
        manifest = folders.read_manifest(folder)
        folders.check_architecture(folder, manifest, self._config.model.shape)
        adapters = files.starts_adapters(folder, manifest, self._config)

        def is_wanted(key: str) -> bool:
            # FP8 statistics are the other run's, and pickles, which loading would run.
            return not key.endswith(STATISTICS) and (adapters or not has_adapter(key))

        tree = {
            chunk: {key: value for key, value in part.items() if is_wanted(key)}
            for chunk, part in self._model_state_dict().items()
        }
        self._load_model(_load(tree, folder), folder, adapters=adapters)
        self._optimizer.reload_model_params()

    def _finish(self) -> None:
        """Complete the save under way, if there is one."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            if dist.get_rank() == 0:
                folders.give_up_room(pending.partial)
            pending.write.finish()
        except FAILURES as error:
            raise unwritable(pending.folder, error) from error
        sums = gather_sums(pending.write.sums)
        on_first_rank(lambda: self._publish(pending, sums))
        self._failures, self._done = 0, pending

    def _publish(self, pending: _Pending, sums: Sums) -> None:
        state = pending.state
        for name, content in pending.extra.items():
            try:
                (pending.partial / name).write_bytes(content)
            except OSError as error:
                raise unwritable(pending.folder / name, error) from error
        manifest = {"step": state.step, "state": dataclasses.asdict(state), "saved_at": time.time(), **self._run}
        folders.publish(pending.partial, pending.folder, manifest, to_yaml(self._config), sums)
        try:
            files.retire(self._config.run_folder, self._config.checkpoint)
        except CheckpointError as error:  # this one is complete all the same
            self._events.record("unsaved", state.step, f"{error}; tried again after the next save")

    def _model_state_dict(self) -> dict[str, Any]:
        """Sharded tensors of every chunk, by ``model0``, ``model1``, ..."""
        return {f"model{i}": model.sharded_state_dict(metadata=_content()) for i, model in enumerate(self._models)}

    def _state_dict(self, is_loading: bool) -> dict[str, Any]:
        model = self._model_state_dict()
        return {**model, "optimizer": self._optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_content())}

    def _load_model(self, loaded: dict[str, Any], folder: Path, *, adapters: bool = True) -> None:
        for index, model in enumerate(self._models):
            found = model.load_state_dict(loaded.get(f"model{index}", {}), strict=False)
            # Transformer Engine's layers ask for FP8 statistics, which a checkpoint of plain torch layers does not have.
            lost = [key for key in found.missing_keys if not key.endswith(STATISTICS) and (adapters or not has_adapter(key))]
            if lost or found.unexpected_keys:
                raise CheckpointError(f"{folder}: does not fit the model ({(lost or found.unexpected_keys)[0]})")

    def _random_shard(self, state: Any) -> ShardedObject:
        """This rank's random states as an element of a list over all ranks."""
        return ShardedObject("random", state, (dist.get_world_size(),), (dist.get_rank(),))

    def _create_moments(self) -> None:
        """Give every parameter its moments, which a run has only after its first update that was not skipped."""
        for inner in self._optimizer.chained_optimizers:
            if not inner.is_stub_optimizer:
                inner.init_state_fn(inner.optimizer, inner.config)

    def _align_optimizer_steps(self) -> None:
        """Give every group the optimizer's step count: fused optimizers do not count in groups that are empty on a rank."""
        groups = self._optimizer.param_groups
        step = over_ranks(max([int(group.get("step", 0)) for group in groups], default=0), dist.ReduceOp.MAX)
        for group in groups:
            if step:
                group["step"] = step


def _content() -> dict[str, Any]:
    """Form of the sharded tensors: whole, which any layout can load. A new dict each time, for Megatron adds groups to it."""
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def _layout(config: StageConfig) -> dict[str, int]:
    """The layout that random states belong to."""
    parallel = config.parallel
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "context": parallel.context,
        "data": parallel_state.get_data_parallel_world_size(),
    }


def _load(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill a sharded tree from a checkpoint; data-parallel ranks share the reading.

    Raises:
        CheckpointError: unusable, or a tensor is missing.
        DiskError: the disk does not answer.
    """
    read_index(folder)  # Megatron unpickles it as it is; this refuses anything but plain descriptions of tensors
    try:
        strategy = get_default_load_sharded_strategy(str(folder))
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if dist.get_world_size(replicas) > 1:
            strategy = FullyParallelLoadStrategyWrapper(strategy, replicas)
        loaded, _, unknown = dist_checkpointing.load(
            tree, str(folder), strategy, validate_access_integrity=False, strict=StrictHandling.RETURN_UNEXPECTED
        )
    except FAILURES as error:
        raise unreadable(folder, error) from error
    lost = sorted(key for key in unknown if not key.endswith(STATISTICS))
    if lost:
        raise CheckpointError(f"{folder}: lacks {lost[0]} and {len(lost) - 1} more tensors that the model needs")
    return loaded


def _is_written_here(shard: object) -> bool:
    """Whether this rank is the one that writes a tensor; a factory's becomes several of the same size together."""
    if not isinstance(shard, ShardedTensor | ShardedTensorFactory):
        return False
    return shard.data is not None and shard.replica_id in (0, (0, 0, 0))
