"""The policy's weights on their way from the ranks that train them to the engines that sample from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.weight_map import hf_names
from megatron_glmv.convert.hf_export import gather_hf_tensors
from megatron_glmv.parallel import platform
from megatron_glmv.rl.engines.engine import Engine
from megatron_glmv.training.optimizer import gather_weights


def send_weights(chunks: Sequence[DistributedDataParallel], shape: ModelShape, engine: Engine, version: int) -> None:
    """Give every engine the weights as they are now; every rank calls this.

    Where rank 0's engine alone takes them, one tensor at a time is whole in memory. Where every rank's does, rank 0 holds all
    of them, because gathering and handing round are collectives of different groups, which must not be mixed.

    Args:
        chunks: this rank's part of the model.
        shape: the architecture.
        engine: this rank's.
        version: that answers from these weights name.

    Raises:
        EngineError: an engine did not get them whole.
    """
    gather_weights(chunks)
    tensors = gather_hf_tensors(chunks, shape)
    if not engine.weights_on_every_rank:
        if dist.get_rank() == 0:
            engine.update_weights(tensors, version)
        for _ in tensors:  # on other ranks: take part
            pass
        dist.barrier()
        if dist.get_rank() != 0:
            engine.expect_version(version)
        return
    own = list(tensors)
    if dist.get_world_size() > 1:
        engine.update_weights(_hand_round(own, shape), version)
    else:
        engine.update_weights(own, version)


def _hand_round(own: Sequence[tuple[str, Tensor]], shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Rank 0's tensors on every rank, one at a time."""
    found = [own[0][1].dtype if own else None]
    dist.broadcast_object_list(found, src=0)
    dtype = found[0] or torch.float32
    mine = dict(own)
    for name, size in hf_names(shape).items():
        tensor = mine[name].contiguous() if mine else torch.empty(size, dtype=dtype, device=platform.device())
        dist.broadcast(tensor, src=0)
        yield name, tensor
