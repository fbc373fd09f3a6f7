"""The JSON files of a Hugging Face folder that follow from the architecture.

Source: transformers 5.23.0, models/glm4v/configuration_glm4v.py and models/glm46v/configuration_glm46v.py. Everything is
written nested and in full: a flat file, or one without all rotary parameters, loads without an error and computes something
else; the dtype of a loaded model follows `dtype`, not the files.
"""

from __future__ import annotations

from typing import Any

from megatron_glmv.config.model import ModelShape

ARCHITECTURES = {"glm4v": "Glm4vForConditionalGeneration", "glm46v": "Glm46VForConditionalGeneration"}
"""The model class that a model type stands for."""


def config_json(shape: ModelShape, dtype: str) -> dict[str, Any]:
    """The tree of config.json; `ModelShape.from_hf` is its inverse.

    Args:
        shape: the architecture.
        dtype: torch's name, for instance bfloat16.
    """
    tokens = shape.tokens
    return {
        "architectures": [ARCHITECTURES[shape.model_type]],
        "model_type": shape.model_type,
        "dtype": dtype,
        "tie_word_embeddings": False,
        "image_token_id": tokens.image,
        "video_token_id": tokens.video,
        "image_start_token_id": tokens.image_start,
        "image_end_token_id": tokens.image_end,
        "video_start_token_id": tokens.video_start,
        "video_end_token_id": tokens.video_end,
        "text_config": _text_config(shape, dtype),
        "vision_config": _vision_config(shape),
    }


def _text_config(shape: ModelShape, dtype: str) -> dict[str, Any]:
    text = shape.text
    return {
        "model_type": "glm4v_text",
        "dtype": dtype,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.ffn_hidden_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": text.max_positions,
        "rms_norm_eps": text.norm_epsilon,
        "initializer_range": 0.02,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "use_cache": True,
        "pad_token_id": shape.tokens.pad,
        "eos_token_id": list(shape.tokens.eos),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": text.rotary_base,
            "partial_rotary_factor": text.rotary_dim / text.head_dim,
            "mrope_section": list(text.mrope_section),
        },
    }


def _vision_config(shape: ModelShape) -> dict[str, Any]:
    vision = shape.vision
    return {
        "model_type": "glm4v_vision",
        "depth": vision.num_layers,
        "hidden_size": vision.hidden_size,
        "num_heads": vision.num_heads,
        "image_size": vision.position_grid * vision.patch_size,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "spatial_merge_size": vision.spatial_merge_size,
        "out_hidden_size": vision.out_hidden_size,
        "intermediate_size": vision.merger_ffn_hidden_size,
        "in_channels": vision.in_channels,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": vision.norm_epsilon,
        "initializer_range": 0.02,
    }


def generation_config_json(shape: ModelShape) -> dict[str, Any]:
    """The tree of generation_config.json: where an answer ends; greedy, because sampling is the caller's choice."""
    return {"do_sample": False, "eos_token_id": list(shape.tokens.eos), "pad_token_id": shape.tokens.pad}
