"""A stage as a user runs it: the real command line, with ranks of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def start_stage(command: str, file: Path, ranks: int, *overrides: str, output: Path | None = None) -> subprocess.Popen[str]:
    """Start `glmv COMMAND` in a process group of its own, its output in one pipe, or in a file."""
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_glmv", command, str(file), *overrides, "--ranks", str(ranks)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if output is None else output.open("w"),
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
