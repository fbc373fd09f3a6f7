"""When the state of a run is saved, between its steps and at its end; the same in training and in reinforcement learning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_glmv.config.training import CheckpointConfig
from megatron_glmv.training.checkpoint import Checkpointer
from megatron_glmv.training.checkpoint_files import SaveReport
from megatron_glmv.training.job import Job, end_run
from megatron_glmv.training.state import TrainState, is_due


class Saves:
    """Saves a run where it is due, and reports what that cost. Every method must be called on every rank.

    Args:
        checkpointer: of the run.
        config: when it is due.
        job: is told.
        report: takes what each checkpoint and local copy cost; None: another rank does.
        extra: what is saved beside tensors and counters: file name -> tree of JSON.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        config: CheckpointConfig,
        job: Job,
        report: Callable[[SaveReport], None] | None = None,
        extra: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._checkpointer, self._config, self._job = checkpointer, config, job
        self._report, self._extra = report, extra

    def run_to_end(self, state: TrainState, num_steps: int, train: Callable[[], bool]) -> bool:
        """Train from the state's step to the last one, or until asked to stop, and leave a checkpoint.

        Args:
            state: counters, which `train` moves on.
            num_steps: of the whole run.
            train: the loop; returns whether it was asked to stop.

        Returns:
            Whether the last step is done.
        """
        # Asked while it started: what it goes on from may be on the nodes' own disks alone.
        stopped = state.step < num_steps and self._job.stop.is_agreed()
        if stopped and state.step:
            self.after_step(state, last=True)
        elif not stopped:
            stopped = train()
        self._checkpointer.close()
        self._report_all()
        end_run(self._job, state, stopped=stopped)
        return not stopped

    def poll(self, state: TrainState) -> None:
        """Complete a save in the background; as `Checkpointer.poll`."""
        self._job.watchdog.beat(state.step, "checkpoint")
        self._checkpointer.poll()

    def after_step(self, state: TrainState, *, last: bool) -> None:
        """Save what is due now that `state.step` steps are done: a checkpoint, or else a local copy.

        Args:
            state: counters.
            last: the run ends here, and so with a checkpoint.
        """
        if last or is_due(state.step, self._config.every_steps):
            self._job.watchdog.beat(state.step, "checkpoint")
            self._checkpointer.save(state, self._extra(), must=last)
        elif is_due(state.step, self._config.local_every_steps):
            self._job.watchdog.beat(state.step, "local copy")
            self._checkpointer.save_local(state, self._extra())
        self._report_all()

    def _report_all(self) -> None:
        for report in self._checkpointer.take_reports():
            if self._report is not None:
                self._report(report)
