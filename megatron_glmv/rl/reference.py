"""The policy that a KL term holds on to: the weights that the stage started from.

They are kept on the host and lent to the model for one pass without gradients, so they cost no memory on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_glmv.model.glm4v import Glm4vModel
from megatron_glmv.rl.batch import PolicyRow
from megatron_glmv.rl.update import old_logprobs
from megatron_glmv.training.assemble import Assembly
from megatron_glmv.training.optimizer import gather_weights


class Reference:
    """A copy of this rank's weights as they are now.

    Args:
        models: this rank's chunks.
    """

    def __init__(self, models: Sequence[Glm4vModel]) -> None:
        self._kept: list[Tensor] = [parameter.detach().to("cpu", copy=True) for parameter in _parameters(models)]

    def add_logprobs(self, assembly: Assembly, rows: Sequence[PolicyRow], temperature: float) -> list[PolicyRow]:
        """The rows with this policy's log-probabilities, on the ranks of the last stage; every rank calls this."""
        gather_weights(assembly.chunks)
        parameters = _parameters(assembly.models)
        own = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
        _fill(parameters, self._kept)
        found = old_logprobs(assembly, rows, temperature)
        _fill(parameters, own)
        return [
            replace(row, terms=replace(row.terms, reference_logprobs=other.terms.old_logprobs))
            for row, other in zip(rows, found, strict=True)
        ]


def _parameters(models: Sequence[Glm4vModel]) -> list[Tensor]:
    return [parameter for model in models for parameter in model.parameters()]


@torch.no_grad()
def _fill(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
