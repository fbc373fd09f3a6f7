"""Process groups: made here, once, from our parallel configuration; everything else asks this module or Megatron's state."""

from __future__ import annotations

import datetime as dt
import math
import os
import random
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_glmv.config.parallel import ParallelConfig
from megatron_glmv.parallel import platform


def num_ranks() -> int:
    """Ranks of this job, from torchrun's environment; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize(config: ParallelConfig, seed: int, timeout_s: float | None = None) -> None:
    """Join the job's process group, build the groups of the layout and seed this rank's generators.

    Args:
        config: the layout; the data-parallel size is what remains.
        seed: the run's seed. No random number depends on the data-parallel rank.
        timeout_s: seconds after which a collective gives up; None: the layout's own.
    """
    timeout = dt.timedelta(seconds=timeout_s or config.timeout_s)
    if not dist.is_initialized():
        # A process that nobody launched is the only rank, and leaves no trace of it in the environment of its children.
        alone: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(platform.backend(), timeout=timeout, **(alone or _fresh_store(timeout)))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        create_gloo_process_groups=False,  # nothing here gathers over gloo, and each would join every replica with every other
        distributed_timeout_minutes=max(1, math.ceil(timeout.total_seconds() / 60)),
    )
    seed_generators(seed)


def _fresh_store(timeout: dt.timedelta) -> dict[str, Any]:
    """Arguments of the process group that keep a restarted group from the addresses that its dead ranks left.

    torch 2.13 lets all starts of an agent share one store (distributed/elastic/rendezvous/dynamic_rendezvous.py). With several
    nodes no number tells the starts apart on all of them, so there the launcher must give each a store of its own.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or restarts == "0":
        return {}
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        if os.environ["RANK"] == "0":
            text = "glmv: warning: ranks started again may not find each other; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
            print(f"{text} in the environment of torchrun", file=sys.stderr, flush=True)
        return {}
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, ranks, is_master=False, timeout=timeout)
    return {"store": dist.PrefixStore(f"start_{restarts}", store), "rank": rank, "world_size": ranks}


def seed_generators(seed: int) -> None:
    """Seed every generator: per pipeline stage for all, per tensor rank for Megatron's model-parallel one."""
    staged = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(staged)
    np.random.seed(staged % 2**32)
    torch.manual_seed(staged)
    tensor_parallel.model_parallel_cuda_manual_seed(staged)


def destroy() -> None:
    """Leave all groups."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def data_rank() -> int:
    """This rank's replica."""
    return parallel_state.get_data_parallel_rank()


def data_size() -> int:
    """Number of replicas."""
    return parallel_state.get_data_parallel_world_size()


def runs_vision() -> bool:
    """Whether this rank's pipeline stage holds the vision tower."""
    return parallel_state.is_pipeline_first_stage(ignore_virtual=True)


def decodes_media() -> bool:
    """Whether this rank decodes its replica's pictures: one rank a replica does, and sends them to the others."""
    return (
        runs_vision()
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )


def coordinates() -> str:
    """This rank's place in the layout, as people write it."""
    places = {
        "tensor": parallel_state.get_tensor_model_parallel_rank(),
        "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
        "context": parallel_state.get_context_parallel_rank(),
        "data": data_rank(),
    }
    return ", ".join(f"{name} {place}" for name, place in places.items())


def place_among_vision_ranks() -> tuple[int, int]:
    """This rank's place among the ranks of its replica that run the vision tower, and how many they are."""
    group = parallel_state.get_tensor_and_context_parallel_group()
    return dist.get_rank(group), dist.get_world_size(group)


def broadcast_patches(patches: torch.Tensor) -> None:
    """Send the decoding rank's pictures to the other ranks of its replica that run the vision tower, in place."""
    group = parallel_state.get_tensor_and_context_parallel_group()
    if dist.get_world_size(group) > 1:
        dist.broadcast(patches, group_src=0, group=group)


def broadcast_in_replica(value: torch.Tensor) -> None:
    """Send a tensor from the decoding rank to every rank of its replica, in place."""
    for group in (parallel_state.get_tensor_and_context_parallel_group(), parallel_state.get_pipeline_model_parallel_group()):
        if dist.get_world_size(group) > 1:
            dist.broadcast(value, group_src=0, group=group)
