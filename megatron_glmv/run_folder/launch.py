"""What a process knows of its launch, from its environment: whoever starts ranks says so there."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

_BEGAN, _LAUNCHER = "GLMV_LAUNCHED_AT", "GLMV_LAUNCHER"
_PR_SET_PDEATHSIG = 1


def num_restarts() -> int:
    """Restarts that the launcher has made of this process's group; 0 without a launcher."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_id() -> str:
    """What all ranks and restarts of one launch have in common, and no other launch; empty where the launcher gives none."""
    given = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if given == "none" else given  # torchrun's word where it was called without --rdzv-id


def is_first_rank() -> bool:
    """Whether this is rank 0, before there is a process group, too."""
    return int(os.environ.get("RANK", "0")) == 0


def mark_launch() -> None:
    """Tell the ranks that this process starts when their launch began, and whose they are."""
    os.environ.update({_BEGAN: str(_process_start()), _LAUNCHER: str(os.getpid())})


def end_with_launcher() -> None:
    """Have the kernel kill this rank when its launcher is killed: nobody else would end it, and the next start meets it."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None:
        return
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):
        sys.exit("glmv: error: the launcher has ended")


def launch_start() -> float:
    """Seconds since the epoch when this launch began: its launcher, if it said so, else this process."""
    return float(os.environ.get(_BEGAN, "0")) or _process_start()


def _process_start() -> float:
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        up_s = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - up_s + ticks / os.sysconf("SC_CLK_TCK")
