"""A trace of chosen steps by torch's profiler, and a table of what they spent their time on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_glmv.config.training import ProfileConfig
from megatron_glmv.parallel import platform

FOLDER = "profile"
"""Of a run: rank_0000.steps_10_11.json.gz for Perfetto or chrome://tracing, and a .txt with the table."""
_TABLE_ROWS = 40


class Profiler:
    """Profiles this rank, where the configuration asks for it; call `before_step` and `after_step` around every step.

    Args:
        config: what to trace; None: nothing.
        run_folder: gets profile/.
        rank: this rank.
        note: prints a line that stays; None on ranks that do not print.
    """

    def __init__(
        self, config: ProfileConfig | None, run_folder: Path, rank: int, note: Callable[[str], None] | None = None
    ) -> None:
        self._config = config if config is not None and rank in config.ranks else None
        self._folder, self._rank, self._note = run_folder / FOLDER, rank, note
        self._profile: profile | None = None

    def before_step(self, step: int) -> None:
        """Begin the trace if this is its first step.

        Args:
            step: the step that begins, counted from 1.
        """
        config = self._config
        if config is None or step != config.first_step:
            return
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if platform.has_cuda() else [])
        self._profile = profile(
            activities=activities, profile_memory=config.memory, with_stack=config.stacks, record_shapes=config.memory
        )
        self._profile.start()

    def after_step(self, step: int, *, last: bool = False) -> None:
        """End the trace after its last step, or the run's, and write it.

        Args:
            step: the step that has ended, counted from 1.
            last: no step follows.
        """
        if self._profile is None or self._config is None:
            return
        if step < self._config.first_step + self._config.steps - 1 and not last:
            return
        if platform.has_cuda():
            torch.cuda.synchronize()
        self._profile.stop()
        self._write(self._profile, step)
        self._profile = None

    def _write(self, traced: profile, step: int) -> None:
        assert self._config is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"rank_{self._rank:04d}.steps_{self._config.first_step}_{step}.json.gz"
        traced.export_chrome_trace(str(trace))
        order = "self_cuda_time_total" if platform.has_cuda() else "self_cpu_time_total"
        table = traced.key_averages().table(sort_by=order, row_limit=_TABLE_ROWS)
        trace.with_name(trace.name.removesuffix(".json.gz") + ".txt").write_text(table + "\n", encoding="utf-8")
        if self._note is not None:
            self._note(f"step {step} | trace written: {trace} (open it at ui.perfetto.dev)")
