"""Ending a run on request: a file in its folder, or a signal to any of its ranks.

All ranks agree at the end of a step, save, and end with exit code 0; before the first step there is nothing to save.
The file is ``RUN_FOLDER/stop``: ``glmv stop`` writes it, as may a batch script. The signals are SIGTERM and SIGUSR1.
"""

from __future__ import annotations

import time
from pathlib import Path

from megatron_glmv.run_folder.launch import launch_start
from megatron_glmv.run_folder.stop_file import STOP_FILE
from megatron_glmv.run_folder.stop_signals import received
from megatron_glmv.training.agreement import agree

_LOOK_EVERY_S = 1.0


class StopRequest:
    """Whether this rank has been asked to stop.

    Args:
        run_folder: of the run.
        reads_file: whether this rank looks for the file; one does.
        restarts: restarts of this launch so far; a file from before the launch is not meant for it.
    """

    def __init__(self, run_folder: Path, *, reads_file: bool, restarts: int = 0) -> None:
        self._file = run_folder / STOP_FILE
        self._reads_file = reads_file
        self._restarts = restarts
        self._reason = ""
        self._looked = 0.0

    def leave_out_earlier(self) -> str:
        """Remove a file that was meant for an earlier start; returns a line about it, or nothing."""
        if not self._reads_file or self._restarts:
            return ""
        try:
            asked = self._file.stat().st_mtime
        except OSError:
            return ""
        if asked >= launch_start():
            return ""
        self._file.unlink(missing_ok=True)
        return f"{self._file}: a request from before this start ({time.ctime(asked)}) was removed; the run goes on"

    def is_requested(self) -> bool:
        """Whether this rank knows of a request; costs a look at the disk once a second on one rank."""
        if not self._reason and (name := received()):
            self._reason = f"signal {name}"
        if not self._reason and self._reads_file and time.monotonic() - self._looked > _LOOK_EVERY_S:
            self._looked = time.monotonic()
            if self._file.exists():
                self._reason = f"{self._file} asks for it"
        return bool(self._reason)

    def is_agreed(self) -> bool:
        """Whether any rank has been asked; every rank must call it."""
        return agree(stop=self.is_requested()).stop

    @property
    def reason(self) -> str:
        """What asked; the same request may have reached another rank only."""
        return self._reason or "another rank was asked"

    def done(self) -> None:
        """Remove the file, so that the next start goes on."""
        if self._reads_file:
            self._file.unlink(missing_ok=True)
