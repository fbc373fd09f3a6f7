"""RUN_FOLDER/stop: the file that asks a run to save and end."""

from __future__ import annotations

from pathlib import Path

from megatron_glmv.config.base import InputError
from megatron_glmv.run_folder.heartbeat import FINISHED, FOLDER, STOPPED, describe_end, is_gone, read_heartbeats

STOP_FILE = "stop"


def request_stop(run_folder: Path) -> str:
    """``glmv stop``: ask a run to save and end; returns a line about what will happen.

    Raises:
        InputError: it is no run's folder, or nothing runs there.
    """
    if not (run_folder / "config.yaml").is_file() and not (run_folder / FOLDER).is_dir():
        raise InputError(f"{run_folder}: holds no config.yaml; name the run_folder of a run")
    beats = read_heartbeats(run_folder)
    ended = bool(beats) and all(beat.failure in (FINISHED, STOPPED) or is_gone(beat) for beat in beats)
    if ended:
        how = describe_end(beats)
        raise InputError(f"{run_folder}: nothing runs there ({how[1] if how else f'it is {beats[0].failure}'})")
    (run_folder / STOP_FILE).touch()
    return f"asked; the run saves a checkpoint and ends after the step it is in. Take it back with: rm {run_folder / STOP_FILE}"
