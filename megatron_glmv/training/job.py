"""One rank's part in a job: joined, watched, and ended with a clear word about why."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_glmv.config.base import InputError
from megatron_glmv.config.fp8 import Hardware, usable_precision
from megatron_glmv.config.training import StageConfig
from megatron_glmv.parallel import groups
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


def run_job(config: StageConfig, work: Callable[[Watchdog], None]) -> int:
    """Join the job, work, and leave it; under torchrun every rank calls this.

    Args:
        config: of the stage.
        work: everything between.

    Returns:
        0 when the work is done, 1 when this rank or a peer failed.

    Raises:
        InputError: something that the user can repair: configuration, data or checkpoint.
    """
    config.check()
    config.data_parallel(groups.num_ranks())
    groups.initialize(config.parallel, config.seed, collective_timeout_s(config.parallel.timeout_s))
    watchdog = Watchdog(config.run_folder, dist.get_rank(), dist.get_world_size(), config.parallel.timeout_s)
    watchdog.start()
    try:
        work(watchdog)
    except InputError as error:
        watchdog.describe_failure(error)  # leaves the reason for the peers
        raise
    except Exception as error:  # noqa: BLE001  (whatever it is, the peers and the user must hear of it)
        report = watchdog.describe_failure(error)
        traceback.print_exc()
        print(f"glmv: error: {report}", file=sys.stderr, flush=True)
        return 1
    watchdog.stop()
    groups.destroy()
    return 0
