"""What one rank holds of the model and its optimizer, as it lies in memory: of use to the same rank of the same layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

STATISTICS = "_extra_state"
"""What keys end in under which Transformer Engine's layers keep FP8 statistics."""


def read_rank(models: Sequence[nn.Module], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """This rank's weights, shares of them in full precision, and moments; the tensors are the live ones.

    Args:
        models: this rank's chunks, unwrapped.
        optimizer: of these chunks.
    """
    groups = [
        {"step": group.get("step"), "params": [{"param": p.detach(), **inner.state.get(p, {})} for p in group["params"]]}
        for inner, group in _groups(optimizer)
    ]
    return {"models": [dict(model.state_dict()) for model in models], "optimizer": groups}


def shapes_of(tree: Mapping[str, Any]) -> list[Any]:
    """Names, shapes and precisions of what every tree of a rank has: moments and FP8 statistics come with the first update."""
    models = [{key: value.shape for key, value in model.items() if not key.endswith(STATISTICS)} for model in tree["models"]]
    shares = [[(part["param"].shape, part["param"].dtype) for part in group["params"]] for group in tree["optimizer"]]
    return [models, shares]


@torch.no_grad()
def restore_rank(models: Sequence[nn.Module], optimizer: MegatronOptimizer, tree: Mapping[str, Any]) -> None:
    """Put everything of `read_rank` back; the tree has the shapes of this rank."""
    for model, saved in zip(models, tree["models"], strict=True):
        model.load_state_dict(saved)
    for (inner, group), saved in zip(_groups(optimizer), tree["optimizer"], strict=True):
        group.pop("step", None)
        if saved["step"] is not None:
            group["step"] = saved["step"]
        for own, part in zip(group["params"], saved["params"], strict=True):
            own.copy_(part["param"])
            inner.state.pop(own, None)
            if moments := {name: _own(value, own) for name, value in part.items() if name != "param"}:
                inner.state[own] = moments


def _own(value: Any, like: Tensor) -> Any:
    return value.to(like.device, copy=True) if isinstance(value, Tensor) else value


def _groups(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.optim.Optimizer, dict[str, Any]]]:
    """The groups of the optimizers that have parameters on this rank."""
    for inner in optimizer.chained_optimizers:
        if not inner.is_stub_optimizer:
            yield from ((inner.optimizer, group) for group in inner.optimizer.param_groups)
