"""Low-rank adapters beside Megatron's linear modules, one for each Hugging Face linear layer that a module is made of.

Megatron computes query, key and value (and gate and up) in one product whose rows are interleaved by head. An adapter belongs
to one of them: z = A x is computed for the module's adapters together, and each row of B multiplies the z of its own adapter.
B has the rows of the weight, in the weight's order and with the weight's cut over tensor ranks, whatever that cut goes through.
Rows of a layer without an adapter are multiplied by zero: they stay zero, and their gradient is zero.

Only z, `rank` wide, is exchanged between tensor ranks. What each exchange makes of the gradients:

| product  | A, B                  | without sequence parallelism       | with it                                          |
| -------- | --------------------- | ---------------------------------- | ------------------------------------------------ |
| column   | A repeated, B by rows | z's gradient is summed over ranks  | z is gathered; A's gradient is a sum over ranks   |
| row      | A by columns, B rep.  | z is summed over ranks             | z is reduce-scattered; B's is a sum over ranks    |
| repeated | both repeated         | nothing                            | nothing; A's and B's are sums over ranks          |

A sum over ranks is marked `sequence_parallel`, and Megatron's `finalize_model_grads` completes it.

Everything is added by forward hooks, so names and classes of the modules stay, in both layer specs. Adapters on Transformer
Engine's modules have not been run on hardware yet.

Shapes: S tokens, s of this tensor rank under sequence parallelism, n adapters of a module, r the rank.

Source: arXiv 2106.09685, section 4.1; megatron-core 0.16.1, tensor_parallel/{layers,mappings}.py.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_glmv.config.lora import LoraConfig
from megatron_glmv.model.glm4v import Glm4vModel
from megatron_glmv.model.names import full_module_names
from megatron_glmv.model.norm import rms_norm
from megatron_glmv.parallel import platform

ADAPTER = "adapter"
"""The adapter's name in its linear module, and so in the names of its parameters."""


@dataclass(frozen=True)
class AdapterPlan:
    """The adapters of one linear module, unsharded.

    Attributes:
        num_adapters: how many of the layers that the module is made of have one.
        inputs: columns of the weight.
        rows: (adapter, count): so many rows of the weight belong to this adapter (None: to a layer without one), in order.
        split: how tensor ranks share the weight: all hold all of it, equal chunks of rows, a chunk of the first half and the
            same chunk of the second half of the rows, equal chunks of columns.
    """

    num_adapters: int
    inputs: int
    rows: tuple[tuple[int | None, int], ...]
    split: Literal["whole", "rows", "gated_rows", "columns"]

    @property
    def outputs(self) -> int:
        """Rows of the weight."""
        return sum(count for _, count in self.rows)

    def adapter_of_row(self) -> Tensor:
        """[outputs] int64: the adapter that each row of the weight belongs to, -1 without one."""
        numbers = torch.tensor([-1 if adapter is None else adapter for adapter, _ in self.rows])
        return numbers.repeat_interleave(torch.tensor([count for _, count in self.rows]))


class Adapter(nn.Module):
    """The adapters of one linear module on this rank."""

    choice: Tensor | None
    """[rows, adapters] 1 where a row belongs to the adapter; None: all rows belong to the only one."""

    def __init__(self, plan: AdapterPlan, lora: LoraConfig, config: TransformerConfig) -> None:
        super().__init__()
        self.plan, self.scale, self.dropout = plan, lora.alpha / lora.rank, lora.dropout
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.ranks = parallel_state.get_tensor_model_parallel_world_size()
        self.sequence_parallel = config.sequence_parallel and self.ranks > 1
        by_rows, by_columns = plan.split in ("rows", "gated_rows"), plan.split == "columns"
        options: dict[str, Any] = {"dtype": config.params_dtype, "device": platform.device()}
        adapter_of_row = self._own_rows(plan.adapter_of_row()).to(options["device"])
        columns = plan.inputs // self.ranks if by_columns else plan.inputs
        self.lora_A = nn.Parameter(torch.zeros(plan.num_adapters * lora.rank, columns, **options))
        self.lora_B = nn.Parameter(torch.zeros(len(adapter_of_row), lora.rank, **options))
        self.axes = {"lora_B": 0} if by_rows else {"lora_A": 1} if by_columns else {}
        for name, parameter in (("lora_A", self.lora_A), ("lora_B", self.lora_B)):
            if name in self.axes:
                set_tensor_model_parallel_attributes(parameter, True, self.axes[name], 1)
            else:
                parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        chooses = plan.num_adapters > 1 or any(adapter is None for adapter, _ in plan.rows)
        choice = adapter_of_row[:, None] == torch.arange(plan.num_adapters, device=adapter_of_row.device)
        self.register_buffer("choice", choice.to(config.params_dtype) if chooses else None, persistent=False)

    def _own_rows(self, rows: Tensor) -> Tensor:
        """This tensor rank's share of what belongs to the rows of the weight."""
        rank = parallel_state.get_tensor_model_parallel_rank()
        if self.plan.split == "rows":
            return rows.chunk(self.ranks)[rank]
        if self.plan.split == "gated_rows":
            return torch.cat([half.chunk(self.ranks)[rank] for half in rows.chunk(2)])
        return rows

    def forward(self, x: Tensor) -> Tensor:
        """What the adapters add to the module's output, [..., inputs of the product] -> [..., outputs of this rank].

        Args:
            x: what the weight multiplies: normed where the module norms; [s, 1, inputs] for a column-parallel module, [S, 1,
                inputs / tensor ranks] for a row-parallel one.
        """
        z = self._exchange(F.linear(self._drop(x), self.lora_A)) * self.scale
        return F.linear(z, self.wide_b())

    def wide_b(self) -> Tensor:
        """B for all adapters' z side by side, [rows, n x r]: zero but in the columns of a row's own adapter."""
        if self.choice is None:
            return self.lora_B
        return (self.choice.unsqueeze(2) * self.lora_B.unsqueeze(1)).flatten(1)

    def merge(self, weight: Tensor) -> Tensor:
        """This rank's share of the weight with the adapters added, in fp32, rounded once to the weight's dtype."""
        wide = torch.addmm(weight.float(), self.wide_b().float(), self.lora_A.float(), alpha=self.scale)
        return wide.to(weight.dtype)

    def _exchange(self, z: Tensor) -> Tensor:
        """The z of all tokens that this rank's product gives, [..., n x r], from this rank's share of it."""
        if self.ranks == 1 or self.plan.split == "whole":
            return z
        if self.plan.split == "columns":
            if self.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(z, group=self.group)
            return reduce_from_tensor_model_parallel_region(z, group=self.group)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(z, tensor_parallel_output_grad=True, group=self.group)
        return copy_to_tensor_model_parallel_region(z, group=self.group)

    def _drop(self, x: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return x
        # Ranks that hold different tokens or columns draw different numbers; ranks that hold the same must draw the same.
        differs = self.ranks > 1 and (self.sequence_parallel or self.plan.split == "columns")
        with get_cuda_rng_tracker().fork() if differs else contextlib.nullcontext():
            kept = torch.empty_like(x).bernoulli_(1 - self.dropout, generator=platform.generator())
        return x * kept / (1 - self.dropout)

    def sharded_state_dict(self, prefix: str, sharded_offsets: Sequence[tuple[int, int, int]], metadata: Any) -> dict[str, Any]:
        """Megatron's description of A and B for a checkpoint.

        The layers of a tower need not all have the same adapters, so a layer's number becomes part of the key, where the
        weights of all layers are one tensor with a leading axis.
        """
        own = self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": self.group, "dp_cp_group": metadata["dp_cp_group"]}
        tree = make_sharded_tensors_for_checkpoint(own, prefix, self.axes, (), **groups)
        if self.plan.split == "gated_rows":
            tree[f"{prefix}lora_B"] = apply_swiglu_sharded_factory(tree[f"{prefix}lora_B"], ())
        layer = f"{sharded_offsets[0][1]}." if sharded_offsets else ""
        for name in own:
            tree[prefix + name].key = f"{prefix}{layer}{name}"
        return tree


def attach_adapters(chunks: Sequence[Glm4vModel], plans: Mapping[str, AdapterPlan], lora: LoraConfig) -> None:
    """Freeze a rank's chunks and give their linear modules zero adapters, which alone learn.

    Args:
        chunks: the rank's chunks, before Megatron's wrappers.
        plans: by the module's name in the whole model.
        lora: rank, scale and dropout.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
        names = full_module_names(chunk)
        for name in [name for name, full in names.items() if full in plans]:
            module = chunk.get_submodule(name)
            module.add_module(ADAPTER, Adapter(plans[names[name]], lora, chunk.config))
            module.register_forward_hook(_add_to_output)
            _describe_adapter_apart(module)
        for module in chunk.modules():
            if isinstance(module, TransformerBlock) and module.config.recompute_granularity == "full":
                module.register_forward_pre_hook(_let_gradients_start)


def has_adapter(name: str) -> bool:
    """Whether a name is that of an adapter's parameter."""
    return f".{ADAPTER}." in name


def _add_to_output(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: a linear module's output, a tensor or Megatron's (output, bias), with the adapter's added.

    Modules that norm their input do it inside, in Transformer Engine in one kernel, so the norm is computed once more.
    """
    x = arguments[0]
    if hasattr(module, "layer_norm_weight"):
        x = rms_norm(x, module.layer_norm_weight, module.config.layernorm_epsilon)  # type: ignore[arg-type, union-attr]
    added = module.get_submodule(ADAPTER)(x)
    return output + added if isinstance(output, Tensor) else (output[0] + added, *output[1:])


def _let_gradients_start(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: recomputed layers pass gradients to their parameters only if their input asks for one, too."""
    hidden = arguments[0]
    if hidden is None or hidden.requires_grad or not torch.is_grad_enabled():
        return arguments
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return arguments
    return (hidden.detach().requires_grad_(), *arguments[1:])


def _describe_adapter_apart(module: nn.Module) -> None:
    """Have a linear module's `sharded_state_dict` describe the adapter as the adapter itself does."""
    own = getattr(module, "sharded_state_dict", None)

    def sharded_state_dict(
        self: nn.Module, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None, **options: Any
    ) -> dict[str, Any]:
        if own is not None:
            tree = own(prefix, sharded_offsets, metadata, **options)
        else:
            state = self.state_dict(prefix="", keep_vars=True)
            tree = make_sharded_tensors_for_checkpoint(
                state,
                prefix,
                {},
                sharded_offsets,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                dp_cp_group=metadata["dp_cp_group"],
            )
        adapter = self.get_submodule(ADAPTER)
        assert isinstance(adapter, Adapter)
        return tree | adapter.sharded_state_dict(f"{prefix}{ADAPTER}.", sharded_offsets, metadata)

    module.sharded_state_dict = types.MethodType(sharded_state_dict, module)  # type: ignore[assignment]
