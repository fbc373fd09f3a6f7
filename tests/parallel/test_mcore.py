"""Our configuration as Megatron's."""

from __future__ import annotations

import pytest
from megatron.core.fp8_utils import is_first_last_bf16_layer

from megatron_glmv.config.base import ConfigError
from megatron_glmv.config.model import ModelConfig
from megatron_glmv.config.parallel import ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.parallel import platform
from megatron_glmv.parallel.mcore import hardware, layer_kind, merger_config, text_config, vision_config
from megatron_glmv.training.job import fit_to_device

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


@pytest.mark.parametrize(
    ("fields", "context", "part"),
    [
        ({"tp_comm_overlap": True}, 1, "megatron.tp_comm_overlap: the buffers"),
        ({"cp_comm_type": "all_gather"}, 2, "megatron.cp_comm_type: all_gather cannot exchange packed rows; use p2p or a2a"),
        ({"cp_comm_type": "a2a+p2p"}, 4, "megatron.cp_comm_type: a2a+p2p"),
        ({"cp_comm_type": "a2a"}, 4, "the 2 key/value heads of a tensor rank to 4 context ranks; use p2p"),
    ],
)
def test_communication_that_packed_rows_do_not_have_is_one_line(fields: dict[str, object], context: int, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        text_config(SHAPE, ParallelConfig(context=context), FP32, RecomputeConfig(), fields)
    assert part in str(caught.value)
    config = text_config(SHAPE, ParallelConfig(context=2), FP32, RecomputeConfig(), {"cp_comm_type": "a2a"})
    assert config.cp_comm_type == "a2a"


@on_cpu
def test_transformer_engine_without_a_device_is_one_line() -> None:
    with pytest.raises(ConfigError, match="Transformer Engine needs a CUDA device"):
        layer_kind(PrecisionConfig(layers="te"))
    assert layer_kind(PrecisionConfig(fp8_text="delayed")) == "torch"


@pytest.mark.parametrize(
    ("recipe", "fields"),
    [("delayed", ("hybrid", "delayed")), ("current", ("hybrid", "tensorwise")), ("block", ("e4m3", "blockwise"))],
)
def test_recipes_are_megatrons_and_each_tower_has_its_own(recipe: str, fields: tuple[str, str]) -> None:
    ends = (0, 0) if recipe == "delayed" else (1, 2)
    text = PrecisionConfig(fp8_text=recipe, bf16_ends_text=ends)
    decoder = text_config(SHAPE, ParallelConfig(), text, RecomputeConfig())
    assert (decoder.fp8, decoder.fp8_recipe) == fields
    assert decoder.first_last_layers_bf16 == any(ends)
    if any(ends):
        assert (decoder.num_layers_at_start_in_bf16, decoder.num_layers_at_end_in_bf16) == ends
        assert [is_first_last_bf16_layer(decoder, layer) for layer in range(4)] == [True, False, True, True]
    assert vision_config(SHAPE, ParallelConfig(), text, RecomputeConfig()).fp8 is None
    vision = PrecisionConfig(fp8_vision=recipe)
    assert text_config(SHAPE, ParallelConfig(), vision, RecomputeConfig()).fp8 is None
    for tower in (
        vision_config(SHAPE, ParallelConfig(), vision, RecomputeConfig()),
        merger_config(SHAPE, ParallelConfig(), vision),
    ):
        assert (tower.fp8, tower.fp8_recipe) == fields


@on_cpu
def test_the_run_goes_on_in_bf16_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig.model_validate(
        {
            "run_folder": "unused",
            "steps": 1,
            "global_batch_rows": 1,
            "model": {"preset": "digits"},
            "precision": {"fp8_text": "current", "fp8_vision": "block"},
            "data": {"sequence_length": 256, "sources": [{"name": "a", "path": "unused"}]},
        }
    )
    fitted = fit_to_device(config, hardware())
    assert not fitted.precision.uses_fp8
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0] == (
        "glmv: warning: precision.fp8_text: current scaling needs a CUDA device, and there is none; going on with bf16"
    )
    assert fit_to_device(fitted, hardware()) == fitted
    assert not capsys.readouterr().err
