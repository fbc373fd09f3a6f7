"""The model's numbers: read from Hugging Face's configuration, counted exactly, refused when they are another model's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Glm4vConfig, Glm4vForConditionalGeneration

from megatron_glmv.config.base import ConfigError
from megatron_glmv.config.count import count_parameters
from megatron_glmv.config.lora import LoraConfig
from megatron_glmv.config.model import ModelConfig, ModelShape

PRESETS = ("digits", "glm-4.1v-9b")


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
        ("model_type", "qwen2_vl", "model_type 'qwen2_vl' is not supported"),
        ("model_type", "glm4v_moe", "model_type 'glm4v_moe' is not supported"),
        ("text_config", None, "no nested text_config"),
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


def test_missing_presets_and_folders_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^model\.preset: no preset 'glm-9b'; there are digits, glm-4\.1v-9b$"):
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
