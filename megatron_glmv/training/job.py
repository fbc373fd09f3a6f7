"""One rank's part in a job: joined, watched, and ended with a clear word about why."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megatron_glmv.config.base import InputError
from megatron_glmv.config.fp8 import Hardware, usable_precision
from megatron_glmv.config.training import StageConfig
from megatron_glmv.parallel import groups
from megatron_glmv.run_folder.checkpoint_folder import complete_folders
from megatron_glmv.run_folder.events import EventLog, read_events
from megatron_glmv.run_folder.heartbeat import FINISHED, STOPPED, describe_end, forget_ranks, read_heartbeats
from megatron_glmv.run_folder.launch import is_first_rank, num_restarts
from megatron_glmv.run_folder.refusal import Outage, note_refusal, refuse_second_launch, repeat_refusal
from megatron_glmv.training.state import TrainState
from megatron_glmv.training.stop import StopRequest
from megatron_glmv.training.watchdog import Watchdog, collective_timeout_s

Stage = TypeVar("Stage", bound=StageConfig)


def fit_to_device(config: Stage, hardware: Hardware) -> Stage:
    """The configuration with the FP8 recipes that this device has; the first rank says in one line what it does otherwise.

    Raises:
        ConfigError: Transformer Engine is asked for by name and cannot run here.
    """
    precision, notes = usable_precision(config.precision, hardware)
    if int(os.environ.get("RANK", "0")) == 0:
        for note in notes:
            print(f"glmv: warning: {note}", file=sys.stderr, flush=True)
    return config.model_copy(update={"precision": precision})


@dataclass(frozen=True)
class Job:
    """What surrounds the work of a rank."""

    watchdog: Watchdog
    stop: StopRequest
    events: EventLog


def run_job(config: StageConfig, work: Callable[[Job], bool]) -> int:
    """Join the job, work, and leave it; under torchrun every rank calls this.

    Args:
        config: of the stage.
        work: everything between; returns whether the last step is done, and not that the run was asked to stop.

    Returns:
        0 when the work is done, or stopped on request and saved; 1 when this rank or a peer failed.

    Raises:
        InputError: something that the user can repair: configuration, data or checkpoint. It is noted, so that the restarts of
            this launch end with the same line, unless it is an outage, which may be over by then.
    """
    repeat_refusal(config.run_folder)
    watchdog: Watchdog | None = None
    try:
        job = _join(config)
        watchdog = job.watchdog
        watchdog.start()
        finished = not _stops_before_work(config, job) and work(job)
    except InputError as error:
        is_outage = isinstance(error, Outage)
        if not is_outage:
            note_refusal(config.run_folder, error)
        if watchdog is not None:
            watchdog.describe_failure(Outage(str(error)) if is_outage else error)  # leaves the reason for the peers
        raise
    except Exception as error:
        if watchdog is None:
            raise
        report = watchdog.describe_failure(error)
        traceback.print_exc()
        print(f"glmv: error: {report}", file=sys.stderr, flush=True)
        return 1
    watchdog.stop(FINISHED if finished else STOPPED)
    groups.destroy()
    return 0


def freeze_setup() -> None:
    """Take everything that stays to the end of the run out of the garbage collector's sight.

    A full collection then takes less than a millisecond instead of 0.2 s. Every rank comes to one in some step, and all others
    wait for it there: of a thousand ranks a few in every step.
    """
    gc.collect()
    gc.freeze()


def end_run(job: Job, state: TrainState, *, stopped: bool) -> None:
    """Record how the run ended; a request to stop has been answered either way."""
    job.stop.done()
    if stopped:
        then = "saved, and the next start goes on from there" if state.step else "the next start begins anew"
        text = f"stopped on request at step {state.step} ({job.stop.reason}); {then}"
        job.events.record("stop", state.step, text)
    else:
        job.events.record("finish", state.step, f"finished, {state.step} steps done")


def _stops_before_work(config: StageConfig, job: Job) -> bool:
    """Whether the run was asked to stop while it started: then it has lost nothing, and ends; every rank must call it."""
    # Local copies are first loaded, and saved where all nodes see them.
    if config.checkpoint.local_folder is not None or not job.stop.is_agreed():
        return False
    step = max(complete_folders(config.run_folder), default=0)
    job.watchdog.beat(step, "stop")
    end_run(job, TrainState(step), stopped=True)
    return True


def _record_end(events: EventLog, run_folder: Path, step: int, text: str) -> None:
    """Record how the start before this one ended.

    An outage that restarts of one launch meet is told once, and is none of the equal faults after which no start helps: all
    restarts may be used up before it is over. The next launch, which may have new servers, counts it.
    """
    said = f"the start before this one ended at step {step}: {text}"
    if not num_restarts() or f": {Outage.__name__}: " not in text:
        events.record("fault", step, said, {"fault": text})
    elif said not in [event["text"] for event in read_events(run_folder, ("fault",))[-1:]]:
        events.record("fault", step, said)


def _join(config: StageConfig) -> Job:
    """Join the process group, and say how the start before this one ended."""
    config.check()
    config.data_parallel(groups.num_ranks())
    first, folder = is_first_rank(), config.run_folder
    if first:
        refuse_second_launch(folder)
    # Read before the ranks meet: afterwards each begins its file anew.
    earlier = describe_end(read_heartbeats(folder)) if first else None
    groups.initialize(config.parallel, config.seed, collective_timeout_s(config.parallel.timeout_s))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if first:
        forget_ranks(folder, ranks)
    watchdog = Watchdog(folder, rank, ranks, config.parallel.timeout_s, coordinates=groups.coordinates())
    events = EventLog(folder, reports=first)
    if earlier is not None:
        _record_end(events, folder, *earlier)
    stop = StopRequest(folder, reads_file=first, restarts=num_restarts())
    if left := stop.leave_out_earlier():
        print(left, file=sys.stderr, flush=True)
    return Job(watchdog, stop, events)
