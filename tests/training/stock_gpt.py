"""A small GPT of stock Megatron parts with a training step, for tests of what surrounds the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_glmv.config.base import validate
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.parallel import groups
from megatron_glmv.training.optimizer import StepOutcome, build_optimizer, set_learning_rates, step_optimizer
from tests.ranks import leave_layout

LAYERS, HIDDEN, VOCABULARY, LENGTH, ROWS = 4, 16, 64, 12, 4


def make_config(run_folder: Path, layout: dict[str, int], **changes: Any) -> TrainConfig:
    """A configuration whose layout and checkpointing are used; its model section only fills the manifest."""
    return validate(
        TrainConfig,
        {
            "run_folder": run_folder,
            "steps": 20,
            "global_batch_rows": ROWS,
            "model": {"preset": changes.pop("preset", "digits")},
            "data": {"sequence_length": 64, "sources": [{"name": "a", "path": "unused"}]},
            "optimizer": {"lr": 2e-2, "schedule": "linear", "warmup_steps": 2},
            "precision": {"dtype": changes.pop("dtype", "fp32")},
            "parallel": {
                "sequence": False,
                "overlap": False,
                "distributed_optimizer": changes.pop("distributed_optimizer", True),
                **layout,
            },
            "checkpoint": changes,
        },
    )


_joined: list[tuple[int, int, int]] = []


def join(config: TrainConfig, seed: int) -> None:
    """Build the layout's groups, unless they are those of the call before, and seed the generators."""
    own = config.parallel
    layout = (own.tensor, own.pipeline, own.virtual_pipeline)
    if _joined and _joined[-1] == layout:
        groups.seed_generators(seed)
        return
    if _joined:
        leave_layout()
    groups.initialize(own, seed)
    _joined.append(layout)


@dataclasses.dataclass
class Trainer:
    """Model, optimizer and a step; batches are a pure function of the step."""

    config: TrainConfig
    chunks: list[Any]
    optimizer: Any

    @classmethod
    def build(cls, config: TrainConfig, seed: int = 11, dropout: float = 0.0) -> Trainer:
        join(config, seed)
        own, dtype = config.parallel, torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
        virtual = own.virtual_pipeline if own.virtual_pipeline > 1 else None
        megatron = TransformerConfig(
            num_layers=LAYERS,
            hidden_size=HIDDEN,
            num_attention_heads=4,
            tensor_model_parallel_size=own.tensor,
            pipeline_model_parallel_size=own.pipeline,
            virtual_pipeline_model_parallel_size=virtual,
            pipeline_dtype=dtype,
            params_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            hidden_dropout=dropout,
            attention_dropout=0.0,
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            persist_layer_norm=False,
        )
        chunks = []
        for stage in range(virtual or 1):
            where = {"ignore_virtual": False, "vp_stage": stage if virtual else None}
            model = GPTModel(
                megatron,
                get_gpt_layer_local_spec(),
                VOCABULARY,
                LENGTH,
                pre_process=parallel_state.is_pipeline_first_stage(**where),
                post_process=parallel_state.is_pipeline_last_stage(**where),
                share_embeddings_and_output_weights=False,
                vp_stage=stage if virtual else None,
            )
            model = Float16Module(megatron, model) if megatron.bf16 else model
            chunks.append(
                DistributedDataParallel(
                    megatron, DistributedDataParallelConfig(use_distributed_optimizer=own.distributed_optimizer), model
                )
            )
        for chunk in chunks:
            chunk.broadcast_params()
        return cls(config, chunks, build_optimizer(chunks, config))

    def step(self, step: int) -> tuple[float, StepOutcome]:
        """One update; the loss is the mean over the global batch, on every rank."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        replica, replicas = groups.data_rank(), groups.data_size()
        tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        losses: list[torch.Tensor] = []

        def forward(rows: Any, model: Any) -> tuple[torch.Tensor, Any]:
            row = next(rows)
            positions = torch.arange(LENGTH)[None]
            mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
            output = model(row[None, :-1], positions, mask, labels=row[None, 1:])

            def loss(values: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                losses.append(values.detach().float().mean())
                return values.float().mean(), {}

            return output, loss

        mine = tokens[replica::replicas]
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(mine) for _ in self.chunks] if len(self.chunks) > 1 else iter(mine),
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(mine),
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        for chunk in self.chunks:
            chunk.finish_grad_sync()
        set_learning_rates(self.optimizer, step, self.config)
        outcome = step_optimizer(self.optimizer)
        first_tensor_rank = parallel_state.get_tensor_model_parallel_rank() == 0
        total = torch.tensor(sum(float(loss) for loss in losses) if first_tensor_rank else 0.0, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / ROWS, outcome

    def weights(self) -> list[torch.Tensor]:
        """A copy of this rank's parameters and optimizer tensors."""
        values = [parameter.detach().float().clone() for chunk in self.chunks for parameter in chunk.parameters()]
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                values += [value.clone() for value in self.optimizer.optimizer.state[parameter].values()]
        return values
