"""What FP8 asks of a device and of shapes: the same functions that a run calls, with devices and shapes that are not here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_glmv.config.base import ConfigError, validate
from megatron_glmv.config.fp8 import Hardware, merged_multiple, usable_precision
from megatron_glmv.config.parallel import ParallelConfig, PrecisionConfig
from megatron_glmv.config.training import TrainConfig

CUDA_13 = (13, 0)
H100, ADA, A100 = ((9, 0), CUDA_13), ((8, 9), CUDA_13), ((8, 0), CUDA_13)
BLACKWELL, OLD_CUDA = ((10, 0), CUDA_13), ((9, 0), (12, 8))
FALLBACKS = [
    (H100, "delayed", "delayed", ""),
    (H100, "current", "current", ""),
    (H100, "block", "block", ""),
    (BLACKWELL, "block", "block", ""),
    (ADA, "delayed", "delayed", ""),
    (ADA, "block", "current", "needs compute capability 9.0, a device has 8.9; going on with current scaling"),
    (OLD_CUDA, "block", "current", "needs a torch built for CUDA 12.9, this one is for 12.8; going on with current scaling"),
    (OLD_CUDA, "delayed", "delayed", ""),
    (A100, "delayed", "off", "needs compute capability 8.9, a device has 8.0; going on with bf16"),
    (A100, "block", "off", "needs compute capability 8.9, a device has 8.0; going on with bf16"),
    ((None, None), "current", "off", "needs a CUDA device, and there is none; going on with bf16"),
]


@pytest.mark.parametrize(("device", "recipe", "usable", "reason"), FALLBACKS, ids=[f"{c[0]} {c[1]}" for c in FALLBACKS])
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_a_device_without_the_recipe_is_one_line(device: Any, recipe: str, usable: str, reason: str, tower: str) -> None:
    hardware = Hardware("a device", *device, has_te=True, has_flash_attention=True)
    asked = PrecisionConfig.model_validate({f"fp8_{tower}": recipe})
    found, notes = usable_precision(asked, hardware)
    assert getattr(found, f"fp8_{tower}") == usable
    assert list(notes) == ([f"precision.fp8_{tower}: {recipe} scaling {reason}"] if reason else [])
    assert PrecisionConfig.model_validate(found.model_dump()) == found


def test_without_the_package_there_is_bf16_and_te_by_name_is_refused() -> None:
    hardware = Hardware("a device", (9, 0), CUDA_13, has_te=False)
    asked = PrecisionConfig(fp8_text="block", bf16_ends_text=(1, 1), fp8_vision="current")
    found, notes = usable_precision(asked, hardware)
    assert found == PrecisionConfig()
    assert len(notes) == 2
    assert "Transformer Engine, which is not installed" in notes[0]
    with pytest.raises(ConfigError, match=r"^precision\.layers: Transformer Engine needs a CUDA device and the package"):
        usable_precision(PrecisionConfig(layers="te"), hardware)


def test_auto_takes_transformer_engine_in_bf16_alone() -> None:
    """In fp32 it has no fused attention: it would pad every segment to the longest."""
    assert PrecisionConfig().layers_on_gpu == "te"
    assert PrecisionConfig(dtype="fp32").layers_on_gpu == "torch"
    assert PrecisionConfig(layers="torch").layers_on_gpu == "torch"
    with pytest.raises(ValueError, match="16 bits only; set dtype bf16, or layers auto"):
        PrecisionConfig(dtype="fp32", layers="te")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_without_attention_over_packed_rows_torchs_layers_are_taken_in_one_line(capability: tuple[int, int]) -> None:
    bare = Hardware("a device", capability, CUDA_13, has_te=True)
    found, [note] = usable_precision(PrecisionConfig(), bare)
    assert (found.layers, found.uses_fp8) == ("torch", False)
    assert note == (
        "precision.layers: on a device Transformer Engine attends over packed rows with flash-attn only, which is not "
        "installed; going on with torch's layers"
    )
    found, notes = usable_precision(PrecisionConfig(fp8_text="current", fp8_vision="block"), bare)
    assert found == PrecisionConfig(layers="torch")
    assert len(notes) == 3
    with pytest.raises(ConfigError, match=r"^precision\.layers: on a device .* install it, or use auto"):
        usable_precision(PrecisionConfig(layers="te"), bare)
    for packed in (Hardware("h100", (9, 0), CUDA_13, has_te=True), replace(bare, has_flash_attention=True)):
        assert usable_precision(PrecisionConfig(layers="te"), packed) == (PrecisionConfig(layers="te"), ())
        assert usable_precision(PrecisionConfig(), packed) == (PrecisionConfig(), ())


def config(parallel: dict[str, Any], precision: dict[str, Any], length: int = 8192, preset: str = "glm-4.1v-9b") -> TrainConfig:
    return validate(
        TrainConfig,
        {
            "run_folder": "runs/x",
            "steps": 1,
            "global_batch_rows": 8,
            "model": {"preset": preset},
            "parallel": parallel,
            "precision": precision,
            "data": {"sequence_length": length, "sources": [{"name": "a", "path": "a"}]},
        },
    )


@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
@pytest.mark.parametrize(
    "parallel", [{}, {"tensor": 2}, {"tensor": 4}, {"tensor": 2, "context": 4}, {"vision": "images", "tensor": 2}]
)
def test_the_9b_computes_in_fp8_in_its_layouts(recipe: str, parallel: dict[str, Any]) -> None:
    config(parallel, {"fp8_text": recipe, "fp8_vision": recipe}).check()


REFUSED = [
    ({}, {"fp8_text": "current"}, 8200, "data.sequence_length: 8200 is not a multiple of 16", "with fp8_text current"),
    # Transformer Engine asserts 8 of a tensor rank and cuBLAS 16 of what the ranks gather; 16 is asked of both.
    ({"tensor": 2}, {"fp8_text": "current"}, 8208, "data.sequence_length: 8208 is not a multiple of 32", "use 8192"),
    ({"tensor": 2}, {"fp8_text": "block"}, 8320, "data.sequence_length: 8320 is not a multiple of 256", "use 8192"),
    ({"tensor": 2, "sequence": False}, {"fp8_text": "block"}, 8200, "data.sequence_length: 8200 is not a multiple of 16", ""),
    ({"context": 4}, {"fp8_text": "delayed"}, 8224, "data.sequence_length: 8224 is not a multiple of 64", ""),
    ({}, {"fp8_text": "block", "bf16_ends_text": [41, 0]}, 8192, "precision.bf16_ends_text: 41 layers", "40 of the tower"),
    (
        {"pipeline": 8},
        {"fp8_text": "block", "bf16_ends_text": [0, 6]},
        8192,
        "precision.bf16_ends_text: 6",
        "5 of one pipeline",
    ),
    ({}, {"fp8_vision": "current", "bf16_ends_vision": [25, 1]}, 8192, "precision.bf16_ends_vision: 25", "24 of the tower"),
]


@pytest.mark.parametrize(("parallel", "precision", "length", "start", "part"), REFUSED, ids=[case[3] for case in REFUSED])
def test_what_fp8_products_do_not_admit_is_one_line(
    parallel: dict[str, Any], precision: dict[str, Any], length: int, start: str, part: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(parallel, precision, length).check()
    message = str(caught.value)
    assert message.startswith(start), message
    assert part in message
    assert "\n" not in message


def test_widths_of_one_rank_are_checked() -> None:
    config({}, {"fp8_text": "block", "fp8_vision": "current"}, 512, "digits").check()
    # The digits' ViT is 96 wide: whole blocks of 128 are needed only where tensor ranks gather them.
    config({}, {"fp8_vision": "block"}, 512, "digits").check()
    config({"tensor": 2, "vision": "images"}, {"fp8_vision": "block"}, 512, "digits").check()
    with pytest.raises(ConfigError, match=r"^precision\.fp8_vision: a hidden size of 96 on one rank is not a multiple of 128"):
        config({"tensor": 2}, {"fp8_vision": "block"}, 512, "digits").check()
    with pytest.raises(ConfigError, match=r"^precision\.fp8_vision: an attention width of 24 on one rank"):
        config({"tensor": 4}, {"fp8_vision": "current"}, 512, "digits").check()


@pytest.mark.parametrize(
    ("precision", "part"),
    [
        ({"bf16_ends_text": [1, 1]}, "bf16_ends_text: all layers compute in bf16 already; it needs fp8_text"),
        ({"fp8_vision": "delayed", "bf16_ends_vision": [1, 0]}, "bf16_ends_vision: delayed scaling takes all layers"),
        ({"fp8_text": "current", "bf16_ends_text": [-1, 0]}, "precision.bf16_ends_text.0"),
    ],
)
def test_layers_in_bf16_stand_beside_fp8_ones(precision: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config({}, precision)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "parallel", "multiple"),
    [
        ("off", {}, 1),
        ("current", {}, 16),
        ("block", {}, 16),
        ("block", {"tensor": 2}, 128),
        ("block", {"tensor": 2, "sequence": False}, 16),
        ("block", {"tensor": 2, "vision": "images"}, 16),
        ("delayed", {"tensor": 4}, 16),
    ],
)
def test_merged_tokens_of_a_rank(recipe: str, parallel: dict[str, Any], multiple: int) -> None:
    precision = PrecisionConfig.model_validate({"fp8_vision": recipe})
    assert merged_multiple(precision, ParallelConfig.model_validate(parallel)) == multiple
