"""Our configuration as Megatron's."""

from __future__ import annotations

import pytest

from megatron_glmv.config.base import ConfigError
from megatron_glmv.config.model import ModelConfig
from megatron_glmv.config.parallel import ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_glmv.parallel import platform
from megatron_glmv.parallel.mcore import layer_kind, text_config

SHAPE = ModelConfig(preset="digits").shape
FP32 = PrecisionConfig(dtype="fp32")
on_cpu = pytest.mark.skipif(platform.has_cuda(), reason="about the CPU platform")


@on_cpu
def test_interleaved_pipelines_wait_for_their_sends_on_gloo() -> None:
    """Overlapped sends read memory that Megatron frees at once: runs died of a corrupted heap, one in four."""
    config = text_config(SHAPE, ParallelConfig(pipeline=2, virtual_pipeline=2), FP32, RecomputeConfig())
    assert not config.overlap_p2p_comm
    assert config.batch_p2p_comm


def test_a_megatron_field_passes_through_and_an_unknown_one_is_refused() -> None:
    fields = {"layernorm_epsilon": 3e-5}
    assert text_config(SHAPE, ParallelConfig(), FP32, RecomputeConfig(), fields).layernorm_epsilon == 3e-5
    with pytest.raises(ConfigError, match=r"megatron\.layer_norm_eps: megatron-core's TransformerConfig has no such field"):
        text_config(SHAPE, ParallelConfig(), FP32, RecomputeConfig(), {"layer_norm_eps": 1e-5})


@on_cpu
@pytest.mark.parametrize("precision", [{"layers": "te"}, {"fp8_text": "delayed"}])
def test_transformer_engine_without_a_device_is_one_line(precision: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="Transformer Engine needs a CUDA device"):
        layer_kind(PrecisionConfig(**precision))
