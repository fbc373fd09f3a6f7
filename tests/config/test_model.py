"""The model's numbers: read from Hugging Face's configuration, counted exactly, refused when they are another model's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Glm4vConfig, Glm4vForConditionalGeneration
from transformers.models.glm4v.modeling_glm4v import Glm4vTextRotaryEmbedding

from megatron_glmv.config.base import ConfigError
from megatron_glmv.config.count import count_parameters
from megatron_glmv.config.lora import LoraConfig
from megatron_glmv.config.model import ModelConfig, ModelShape

PRESETS = ("digits", "glm-4.1v-9b", "glm-4.6v-flash")


@pytest.mark.parametrize("preset", PRESETS)
def test_counts_equal_transformers(preset: str):
    config = ModelConfig(preset=preset)
    with torch.device("meta"):
        model = Glm4vForConditionalGeneration(Glm4vConfig(**copy.deepcopy(config.hf_config)))

    def size(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    count = count_parameters(config.shape)
    visual = model.model.visual
    assert count.merger == size(visual.downsample) + size(visual.merger)
    assert count.vision == size(visual) - count.merger
    assert count.text == size(model.model.language_model)
    assert count.head == size(model.lm_head)
    assert count.total == size(model)


def test_the_released_9b_counts_as_published():
    count = count_parameters(ModelConfig(preset="glm-4.1v-9b").shape)
    assert count.total == 10_292_777_472
    assert count.vision + count.merger == 892_498_432
    assert count.merger == 210_251_776
    assert (count.text, count.head) == (8_779_522_048, 620_756_992)


def changed(path: str, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(ModelConfig(preset="digits").hf_config)
    *folders, key = path.split(".")
    node = tree
    for folder in folders:
        node = node[folder]
    if value is None:
        del node[key]
    else:
        node[key] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        ("model_type", "qwen2_vl", "model_type 'qwen2_vl' is not supported; this project trains glm4v and glm46v"),
        ("model_type", None, "model_type None is not supported"),
        ("model_type", "glm4v_moe", "model_type 'glm4v_moe' is a mixture of experts (GLM-4.5V, GLM-4.6V)"),
        ("text_config.model_type", "glm4v_moe_text", "text_config.model_type 'glm4v_moe_text' is a mixture of experts"),
        ("text_config.model_type", "llama", "text_config.model_type is 'llama'; only 'glm4v_text'"),
        ("vision_config.model_type", "glm4v_moe_vision", "vision_config.model_type is 'glm4v_moe_vision'"),
        ("text_config", None, "no nested text_config"),
        ("vision_config", None, "no nested text_config / vision_config"),
        ("text_config.rope_scaling", {"type": "linear", "factor": 2.0}, "rope_type is 'linear'"),
        ("text_config.head_dim", 48, "text_config.head_dim: 48 is not hidden_size / num_attention_heads"),
        ("vision_config.rope_parameters", {"rope_theta": 500.0}, "vision_config.rope_parameters.rope_theta is 500.0"),
        ("text_config.num_hidden_layers", None, "'num_hidden_layers' is missing"),
        ("text_config.rope_parameters", None, "'rope_parameters' is missing"),
        ("text_config.eos_token_id", None, "'eos_token_id' is missing"),
        ("text_config.rope_parameters.mrope_section", [8, 12, 12], "mrope_section"),
        ("text_config.rope_parameters.rope_type", "yarn", "rope_type is 'yarn'"),
        ("text_config.num_key_value_heads", 3, "3 key/value heads"),
        ("text_config.num_hidden_layers", 0, "num_layers"),
        ("text_config.hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("tie_word_embeddings", True, "tie_word_embeddings is True"),
        ("vision_config.attention_bias", True, "attention_bias is True"),
        ("vision_config.num_heads", 5, "5 heads"),
        ("vision_config.out_hidden_size", 64, "out_hidden_size 64 differs"),
    ],
)
def test_other_architectures_are_refused_in_one_line(path: str, value: Any, part: str):
    with pytest.raises(ConfigError) as caught:
        ModelShape.from_hf(changed(path, value), "here/config.json")
    message = str(caught.value)
    assert message.startswith("here/config.json: ")
    assert part in message
    assert "\n" not in message


def test_a_hugging_face_folder_gives_the_same_numbers_as_its_preset(tmp_path: Path):
    config = Glm4vConfig(**copy.deepcopy(ModelConfig(preset="glm-4.1v-9b").hf_config))
    config.save_pretrained(tmp_path)
    assert ModelConfig(hf_folder=tmp_path).shape == ModelConfig(preset="glm-4.1v-9b").shape


def in_the_layout_of_transformers_4(tree: dict[str, Any], **rope: Any) -> dict[str, Any]:
    """As transformers 4.57.1 saves it (run): rotary numbers beside rope_scaling, glm4v as the vision tower's type, nulls."""
    tree = copy.deepcopy(tree)
    text = tree["text_config"]
    named = text.pop("rope_parameters")
    text |= {"rope_theta": named["rope_theta"], "partial_rotary_factor": named["partial_rotary_factor"]}
    text |= {"rope_scaling": {"rope_type": "default", "mrope_section": named["mrope_section"]}, "image_token_id": None, **rope}
    tree["vision_config"]["model_type"] = "glm4v"
    return tree


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 500000.0, "head_dim": None},
        {"rope_scaling": {"type": "default", "mrope_section": [4, 14, 14]}},
        {"rope_scaling": {"mrope_section": [8, 12, 12], "rope_theta": 7.0, "partial_rotary_factor": 0.5}},
        {"rope_scaling": None, "rope_theta": 20000.0},
        {"rope_scaling": None, "rope_parameters": {"mrope_section": [2, 15, 15]}},
    ],
)
def test_files_of_transformers_4_are_read_as_transformers_5_reads_them(rope: dict[str, Any], tmp_path: Path):
    tree = in_the_layout_of_transformers_4(ModelConfig(preset="glm-4.1v-9b").hf_config, **rope)
    (tmp_path / "config.json").write_text(json.dumps(tree))
    read = AutoConfig.from_pretrained(tmp_path).text_config
    text = ModelConfig(hf_folder=tmp_path).shape.text
    assert text.rotary_base == read.rope_parameters["rope_theta"]
    assert text.rotary_dim == 128 * read.rope_parameters.get("partial_rotary_factor", 1.0)
    assert list(text.mrope_section) == read.rope_parameters.get("mrope_section", [8, 12, 12])
    with torch.device("meta"):
        rotary = Glm4vTextRotaryEmbedding(read)
    assert (2 * rotary.inv_freq.numel(), rotary.mrope_section) == (text.rotary_dim, list(text.mrope_section))


def test_a_file_without_half_of_the_rotary_numbers_is_refused():
    tree = in_the_layout_of_transformers_4(ModelConfig(preset="glm-4.1v-9b").hf_config, partial_rotary_factor=None)
    with pytest.raises(ConfigError, match=r"mrope_section \[8, 12, 12\] must sum to half of the 128 rotated channels"):
        ModelShape.from_hf(tree, "here")


@pytest.mark.parametrize("kind", ["glm4v", "glm46v"])
def test_what_a_file_leaves_out_is_what_transformers_fills_in(kind: str, tmp_path: Path):
    tree = copy.deepcopy(ModelConfig(preset="glm-4.6v-flash").hf_config) | {"model_type": kind}
    for key in [key for key in tree if key.endswith("_token_id")]:
        del tree[key]
    for key in ("model_type", "head_dim", "rms_norm_eps", "hidden_act"):
        del tree["text_config"][key]
    for key in ("model_type", "in_channels", "rms_norm_eps", "temporal_patch_size", "spatial_merge_size"):
        del tree["vision_config"][key]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    shape, read = ModelConfig(hf_folder=tmp_path).shape, AutoConfig.from_pretrained(tmp_path)
    assert shape.model_type == kind
    for name in ("image", "video", "image_start", "image_end", "video_start", "video_end"):
        assert getattr(shape.tokens, name) == getattr(read, f"{name}_token_id")
    assert shape.text.norm_epsilon == read.text_config.rms_norm_eps
    vision = shape.vision.model_dump()
    hf = {"in_channels": "in_channels", "norm_epsilon": "rms_norm_eps", "temporal_patch_size": "temporal_patch_size",
          "spatial_merge_size": "spatial_merge_size"}  # fmt: skip
    assert {name: vision[name] for name in hf} == {name: getattr(read.vision_config, key) for name, key in hf.items()}


def test_a_flat_file_is_refused():
    tree = copy.deepcopy(ModelConfig(preset="digits").hf_config)
    text = tree.pop("text_config")
    with pytest.raises(ConfigError, match=r"^here: no nested text_config / vision_config; re-save it"):
        ModelShape.from_hf({**text, **tree}, "here")


def test_ends_and_padding_may_stand_beside_the_text_config():
    tree = copy.deepcopy(ModelConfig(preset="digits").hf_config)
    tree |= {key: tree["text_config"].pop(key) for key in ("eos_token_id", "pad_token_id")}
    assert ModelShape.from_hf(tree, "here") == ModelConfig(preset="digits").shape


def test_the_relatives_differ_in_context_rotary_base_and_tokens_only():
    first, second = (ModelConfig(preset=name).shape.model_dump() for name in PRESETS[1:])
    assert second.pop("tokens") != first.pop("tokens")
    assert (second["text"].pop("rotary_base"), first["text"].pop("rotary_base")) == (500_000.0, 10_000.0)
    assert (second["text"].pop("max_positions"), first["text"].pop("max_positions")) == (131_072, 65_536)
    assert first == second


def test_a_shape_that_names_no_model_type_is_glm4v():
    tree = ModelConfig(preset="digits").shape.model_dump()
    del tree["model_type"]
    assert ModelShape.model_validate(tree) == ModelConfig(preset="digits").shape


def test_missing_presets_and_folders_are_named(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"^model\.preset: no preset 'glm-9b'; there are digits, glm-4\.1v-9b, glm-4\.6v-flash$"
    ):
        _ = ModelConfig(preset="glm-9b").shape
    with pytest.raises(ConfigError, match=r"^model\.hf_folder: .*config\.json cannot be read"):
        _ = ModelConfig(hf_folder=tmp_path).shape
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^model\.hf_folder: .*is not JSON"):
        _ = ModelConfig(hf_folder=tmp_path).shape


def test_presets_are_complete_hugging_face_configurations():
    for preset in PRESETS:
        tree = ModelConfig(preset=preset).hf_config
        rebuilt = json.loads(Glm4vConfig(**copy.deepcopy(tree)).to_json_string(use_diff=False))
        for part in ("text_config", "vision_config"):
            wrong = {key: value for key, value in tree[part].items() if rebuilt[part][key] != value}
            assert not wrong, f"{preset}.{part}"


def test_freezing_and_adapters_exclude_each_other():
    """With adapters every weight is frozen, so a part in freeze would say nothing."""
    with pytest.raises(ValueError, match="freeze: with lora no weight learns anyway"):
        ModelConfig(preset="digits", freeze=("vision",), lora=LoraConfig(targets=("q_proj",)))
