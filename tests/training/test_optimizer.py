"""Parameter groups, learning rates per part, and the step that is skipped, on 4 real ranks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_glmv.config.base import validate
from megatron_glmv.config.training import TrainConfig
from tests.ranks import leave_layout, run_ranks

FROZEN: tuple[tuple[str, ...], ...] = ((), ("vision", "merger"), ("text",))


def make_config(**changes: Any) -> TrainConfig:
    tree = {
        "run_folder": "unused",
        "steps": 10,
        "global_batch_rows": 4,
        "model": {"preset": "digits", "freeze": changes.pop("freeze", ())},
        "data": {"sequence_length": 64, "sources": [{"name": "a", "path": "unused"}]},
        "optimizer": {"lr": 1e-2, "vision_lr": 1e-3, "weight_decay": 0.1, "schedule": "constant"},
        "precision": {"dtype": changes.pop("dtype", "fp32")},
        "parallel": changes,
    }
    return validate(TrainConfig, tree)


class Block(nn.Module):
    """A sharded matrix and a norm that every tensor rank repeats, as in a transformer layer."""

    def __init__(self, megatron: Any) -> None:
        super().__init__()
        from megatron.core.tensor_parallel import ColumnParallelLinear

        self.linear = ColumnParallelLinear(
            8, 8, config=megatron, init_method=lambda w: nn.init.normal_(w, std=0.1), gather_output=True, bias=True
        )
        self.input_layernorm = nn.LayerNorm(8, bias=False, dtype=megatron.params_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.input_layernorm(x))[0]


def build(config: TrainConfig) -> Any:
    """A model with the three parts on the first stage and only text on the second, wrapped as Megatron wraps it."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    megatron = TransformerConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        tensor_model_parallel_size=config.parallel.tensor,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        gradient_accumulation_fusion=False,
    )
    model = MegatronModule(megatron)
    if parallel_state.is_pipeline_first_stage():
        model.vision_model = Block(megatron)
        model.vision_projection = Block(megatron)
    model.decoder = Block(megatron)
    for name, parameter in model.named_parameters():
        part = "vision" if "vision_model" in name else "merger" if "vision_projection" in name else "text"
        parameter.requires_grad = part not in config.model.freeze
    wrapper = DistributedDataParallel(
        config=megatron,
        ddp_config=DistributedDataParallelConfig(use_distributed_optimizer=config.parallel.distributed_optimizer),
        module=model,
    )
    wrapper.broadcast_params()
    return wrapper


def backward(wrapper: Any, scale: float = 1.0) -> None:
    wrapper.zero_grad_buffer()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 8, generator=generator, dtype=torch.float32).to(next(wrapper.parameters()).dtype)
    for block in wrapper.module.children():
        x = block(x)
    if x.requires_grad:
        (x.float().square().sum() * scale).backward()
    wrapper.finish_grad_sync()


def snapshot(wrapper: Any, optimizer: Any) -> list[torch.Tensor]:
    """Everything that a skipped step must leave as it was."""
    values = [parameter.detach().float().clone() for parameter in wrapper.parameters()]
    for group in optimizer.param_groups:
        values.append(torch.tensor(float(group.get("step", 0))))
        for parameter in group["params"]:
            values.append(parameter.detach().clone())
            values += [value.clone() for value in optimizer.optimizer.state.get(parameter, {}).values()]
    return values


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def scenario(config: TrainConfig) -> dict[str, Any]:
    """Build, take a step, take two that must be skipped, take another; report what happened on this rank."""
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    from megatron_glmv.parallel import groups
    from megatron_glmv.training.optimizer import build_optimizer, set_learning_rates, step_optimizer

    leave_layout()
    groups.initialize(config.parallel, seed=5)
    wrapper = build(config)
    optimizer = build_optimizer([wrapper], config)
    before = {name: parameter.detach().clone() for name, parameter in wrapper.module.named_parameters()}
    report: dict[str, Any] = {
        "groups": [(g["is_decoupled_lr"], g["wd_mult"], g["max_lr"], len(g["params"])) for g in optimizer.param_groups],
        "rates": set_learning_rates(optimizer, 0, config),
        "group_rates": {(g["is_decoupled_lr"], g["wd_mult"]): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups},
    }
    backward(wrapper)
    report["first"] = step_optimizer(optimizer)
    report["moved"] = {n for n, p in wrapper.module.named_parameters() if not torch.equal(p, before[n])}

    state = snapshot(wrapper, optimizer)
    last = dist.get_rank() == dist.get_world_size() - 1
    trainable = [p for p in wrapper.parameters() if p.requires_grad]
    backward(wrapper, scale=float("nan") if (last and trainable) or (not last and "text" in config.model.freeze) else 1.0)
    report["everywhere"] = step_optimizer(optimizer)
    report["everywhere_unchanged"] = same(state, snapshot(wrapper, optimizer))

    backward(wrapper)
    # Only parameters that the gradient norm does not count, on tensor rank 1.
    repeated = [p for p in trainable if not param_is_not_tensor_parallel_duplicate(p)]
    for parameter in repeated:
        parameter.main_grad.view(-1).fill_(float("inf"))
    report["repeated_parameter_hit"] = bool(repeated)
    report["repeated"] = step_optimizer(optimizer)
    report["repeated_unchanged"] = same(state, snapshot(wrapper, optimizer))

    backward(wrapper)
    report["last"] = step_optimizer(optimizer)
    report["steps"] = {group.get("step") for group in optimizer.param_groups if group["params"]}
    return report


LAYOUTS = [
    {"tensor": 2, "pipeline": 2, "sequence": False},
    {"tensor": 2, "pipeline": 1, "sequence": False},
]
CASES = [
    {**layout, "distributed_optimizer": sharded, "overlap": False, "dtype": dtype, "freeze": ()}
    for layout, sharded, dtype in itertools.product(LAYOUTS, (True, False), ("fp32", "bf16"))
] + [
    {**LAYOUTS[0], "distributed_optimizer": sharded, "overlap": False, "dtype": "bf16", "freeze": freeze}
    for freeze, sharded in itertools.product(FROZEN[1:], (True, False))
]


def all_cases(rank: int) -> list[dict[str, Any]]:
    return [scenario(make_config(**case)) for case in CASES]


@pytest.fixture(scope="module")
def reports() -> list[list[dict[str, Any]]]:
    """Reports by rank, then case."""
    return run_ranks(all_cases, 4, timeout_s=180)


def of_case(reports: list[list[dict[str, Any]]], index: int) -> list[dict[str, Any]]:
    return [rank[index] for rank in reports]


IDS = ["-".join(str(value) for value in case.values()) for case in CASES]


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_groups_are_aligned_over_ranks(reports: list[list[dict[str, Any]]], index: int) -> None:
    ranks = of_case(reports, index)
    learning = {"vision", "merger", "text"} - set(CASES[index]["freeze"])
    for rank in ranks:
        assert [group[:3] for group in rank["groups"]] == [group[:3] for group in ranks[0]["groups"]]
        assert {group[:2] for group in rank["groups"]} == {(part, decay) for part in learning for decay in (0.0, 1.0)}
        assert rank["rates"] == {"vision": 1e-3, "merger": 1e-2, "text": 1e-2}
        for (part, decay), (rate, weight_decay) in rank["group_rates"].items():
            assert (rate, weight_decay) == (rank["rates"][part], 0.1 * decay)


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_a_finite_step_moves_what_learns(reports: list[list[dict[str, Any]]], index: int) -> None:
    ranks = of_case(reports, index)
    for rank in ranks:
        assert rank["first"].applied and rank["last"].applied
        assert rank["first"].grad_norm == ranks[0]["first"].grad_norm > 0
        frozen = set(CASES[index]["freeze"])
        names = {"vision": "vision_model", "merger": "vision_projection", "text": "decoder"}
        assert not any(name.startswith(names[part]) for part in frozen for name in rank["moved"])
    assert any(rank["moved"] for rank in ranks)


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_a_non_finite_gradient_anywhere_skips_everywhere(reports: list[list[dict[str, Any]]], index: int) -> None:
    for rank in of_case(reports, index):
        assert not rank["everywhere"].applied
        assert rank["everywhere"].grad_norm != rank["everywhere"].grad_norm or rank["everywhere"].grad_norm == float("inf")
        assert rank["everywhere_unchanged"]
        assert not rank["repeated"].applied
        assert rank["repeated_unchanged"]
        assert rank["steps"] <= {2}, "skipped steps must not count in the bias correction"
    assert any(rank["repeated_parameter_hit"] for rank in of_case(reports, index))
