"""Our configuration as Megatron's `TransformerConfig`, one for each of the decoder, the vision tower and the merger."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.transformer import TransformerConfig

from megatron_glmv.config.base import ConfigError
from megatron_glmv.config.fp8 import Hardware, usable_precision
from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.parallel import ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_glmv.parallel import platform

try:
    import transformer_engine  # noqa: F401

    HAVE_TE = True
except ImportError:
    HAVE_TE = False

FP8_FIELDS = {
    "delayed": {"fp8": "hybrid", "fp8_recipe": "delayed"},
    "current": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "block": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}
"""Our recipes as Megatron's fields. hybrid takes e5m2, with its wider range, for gradients; blocks are narrow enough for e4m3
everywhere, which is Transformer Engine's own choice for them."""
HAVE_APEX = bool(megatron_layers._grad_accum_fusion_available)
"""Whether Megatron's own linear layers can add a weight's gradient to the accumulated one within the product."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def hardware() -> Hardware:
    """What this rank's device can do."""
    cuda = torch.version.cuda
    return Hardware(
        name=platform.device_name(),
        capability=torch.cuda.get_device_capability() if platform.has_cuda() else None,
        cuda=(int(cuda.split(".")[0]), int(cuda.split(".")[1])) if cuda else None,
        has_te=HAVE_TE,
        has_flash_attention=find_spec("flash_attn") is not None,
    )


def layer_kind(precision: PrecisionConfig) -> str:
    """Which layer spec to use: ``te`` or ``torch``.

    Raises:
        ConfigError: Transformer Engine is asked for by name and cannot run here.
    """
    precision = usable_precision(precision, hardware()).precision
    if precision.layers == "auto" and not (HAVE_TE and platform.has_cuda()):
        return "torch"
    return precision.layers_on_gpu


def fuses_gradients(kind: str) -> bool:
    """Whether the linear layers of this spec can add a weight's gradient to the accumulated one within the product.

    Transformer Engine's do by themselves; Megatron's own need apex's extension. Only under Megatron's DDP, which holds the sum.
    """
    return platform.has_cuda() and (kind == "te" or HAVE_APEX)


def text_config(
    shape: ModelShape,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    recompute: RecomputeConfig,
    passed_through: dict[str, Any] | None = None,
) -> TransformerConfig:
    """The decoder's configuration; `passed_through` are the user's own Megatron fields.

    Raises:
        ConfigError: a passed-through field that Megatron does not have, or that Megatron refuses.
    """
    text = shape.text
    # Megatron frees a stage's output as soon as its send is launched. That is safe where streams keep the order; gloo would go
    # on reading the freed memory.
    overlaps_sends = parallel.virtual_pipeline > 1 and parallel.overlap and platform.has_cuda()
    fields: dict[str, Any] = dict(
        num_layers=text.num_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.ffn_hidden_size,
        num_attention_heads=text.num_heads,
        num_query_groups=text.num_kv_heads,
        kv_channels=text.head_dim,
        layernorm_epsilon=text.norm_epsilon,
        add_qkv_bias=True,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        **_split(parallel, text.num_layers),
        context_parallel_size=parallel.context,
        pipeline_dtype=DTYPES[precision.dtype],
        batch_p2p_comm=not overlaps_sends,
        overlap_p2p_comm=overlaps_sends,
        deallocate_pipeline_outputs=True,
        **_common(parallel, precision, parallel.tensor),
        **_fp8(precision.fp8_text, precision.bf16_ends_text),
        **_recompute(recompute.text),
    )
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    for name in passed_through or {}:
        if name not in known:
            raise ConfigError(f"megatron.{name}: megatron-core's TransformerConfig has no such field")
    _check_communication(passed_through or {}, shape, parallel)
    try:
        return TransformerConfig(**(fields | (passed_through or {})))
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"megatron: TransformerConfig refuses these fields ({' '.join(str(error).split())})") from error


def _check_communication(fields: dict[str, Any], shape: ModelShape, parallel: ParallelConfig) -> None:
    """Refuse ways of communicating that packed rows of Transformer Engine do not have, before they fail inside a layer.

    Source: Transformer Engine 2.11, pytorch/attention/dot_product_attention/context_parallel.py (thd with p2p and a2a only) and
    pytorch/module/base.py (`initialize_ub`: buffers of one fixed shape, made by the program).

    Raises:
        ConfigError: one line with the field.
    """
    if fields.get("tp_comm_overlap"):
        raise ConfigError(
            "megatron.tp_comm_overlap: the buffers that it needs are of one shape and are not made here; leave it out"
        )
    way, shared = fields.get("cp_comm_type"), max(1, shape.text.num_kv_heads // parallel.tensor)
    if way not in (None, "p2p", "a2a"):
        raise ConfigError(f"megatron.cp_comm_type: {way} cannot exchange packed rows; use p2p or a2a")
    if way == "a2a" and shared % parallel.context:
        raise ConfigError(
            f"megatron.cp_comm_type: a2a deals the {shared} key/value heads of a tensor rank to {parallel.context} context "
            "ranks; use p2p"
        )


def vision_config(
    shape: ModelShape, parallel: ParallelConfig, precision: PrecisionConfig, recompute: RecomputeConfig
) -> TransformerConfig:
    """The vision tower's configuration: it lives on the first stage and sees whole images, hence no pipeline and no context."""
    vision = shape.vision
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_heads,
        layernorm_epsilon=vision.norm_epsilon,
        add_qkv_bias=False,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        **_common(parallel, precision, parallel.vision_tensor),
        **_fp8(precision.fp8_vision, precision.bf16_ends_vision),
        **_recompute(recompute.vision),
    )


def merger_config(shape: ModelShape, parallel: ParallelConfig, precision: PrecisionConfig) -> TransformerConfig:
    """The merger's configuration: one gated MLP of its own width at the decoder's hidden size."""
    vision = shape.vision
    return TransformerConfig(
        num_layers=1,
        hidden_size=vision.out_hidden_size,
        ffn_hidden_size=vision.merger_ffn_hidden_size,
        num_attention_heads=vision.num_heads,
        kv_channels=vision.head_dim,
        layernorm_epsilon=1e-5,  # torch.nn.LayerNorm's own default, which Hugging Face's merger uses
        add_qkv_bias=False,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        **_common(parallel, precision, parallel.vision_tensor),
        **_fp8(precision.fp8_vision),
    )


def _split(parallel: ParallelConfig, num_layers: int) -> dict[str, Any]:
    """How the decoder's layers are divided over the stages; Megatron takes an empty first one in a written layout only."""
    if parallel.first_stage_layers == 0:
        stages = [["decoder"] * layers for layers in parallel.stage_layers(num_layers)]
        return {"pipeline_model_parallel_layout": [["embedding"], *stages[1:-1], [*stages[-1], "loss"]]}
    return {
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers,
    }


def _common(parallel: ParallelConfig, precision: PrecisionConfig, tensor: int) -> dict[str, Any]:
    """Fields that both towers share; `tensor` ranks share the matrices."""
    dtype = DTYPES[precision.dtype]
    return {
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": parallel.sequence_parallel and tensor > 1,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": platform.has_cuda(),
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "calculate_per_token_loss": True,
        "perform_initialization": False,
    }


def _fp8(recipe: str, bf16_ends: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """Fields of one tower's FP8 recipe; of the amax of delayed scaling, Megatron's defaults stay (a history of one)."""
    if recipe == "off":
        return {}
    first, last = bf16_ends
    ends = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": first, "num_layers_at_end_in_bf16": last}
    return FP8_FIELDS[recipe] | (ends if first or last else {})


def _recompute(kind: str) -> dict[str, Any]:
    if kind == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if kind == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}
