"""What ranks do in the planner's tests of activations: run the real model forward and weigh what autograd keeps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_glmv.config.training import TrainConfig
from megatron_glmv.sequence.packed import PackedSequence
from tests.ranks import leave_layout


class _Kept:
    """A tensor that autograd has put away; it goes when autograd lets it go."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def keep_all(rank: int, trees: Sequence[dict[str, Any]], rows: Sequence[PackedSequence]) -> list[list[tuple[int, int]]]:
    """For each configuration and row, bytes that a forward pass keeps on this rank, and the tokens that it has losses of."""
    return [_keep(TrainConfig.model_validate(tree), rows) for tree in trees]


def _keep(config: TrainConfig, rows: Sequence[PackedSequence]) -> list[tuple[int, int]]:
    from megatron_glmv.parallel import groups
    from megatron_glmv.training.assemble import assemble, assemble_model

    leave_layout()
    groups.initialize(config.parallel, seed=1)
    assembly = assemble(config, assemble_model(config))
    for chunk in assembly.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    return [kept_bytes(assembly, row) for row in rows]


def kept_bytes(assembly: Any, row: PackedSequence) -> tuple[int, int]:
    """Bytes of all storages that autograd keeps for one row, but those of weights, and its losses; one stage with one chunk."""
    from megatron_glmv.training.step import _weighted_loss, chunk_inputs

    model, kept = assembly.chunks[0], weakref.WeakSet[_Kept]()
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.module.parameters()}

    def pack(tensor: Tensor) -> _Kept:
        holder = _Kept(tensor)
        kept.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        inputs = chunk_inputs(assembly.config, row, model.module)
        loss = _weighted_loss(inputs.loss_weights, model(inputs))[0]
    gc.collect()
    storages = {holder.tensor.untyped_storage().data_ptr(): holder.tensor.untyped_storage().nbytes() for holder in kept}
    assert loss.requires_grad
    return sum(size for place, size in storages.items() if place not in owned), inputs.labels.size(1)
