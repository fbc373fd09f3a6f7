"""The model's numbers, read from a Hugging Face ``config.json`` or a named preset, never retyped.

Source: transformers 5.23.0, models/glm4v/configuration_glm4v.py (field names and meaning).
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from megatron_glmv.config.base import Config, ConfigError, one_line
from megatron_glmv.config.lora import LoraConfig

PRESETS = Path(__file__).parent / "presets"
SUPPORTED = ("glm4v",)
FIXED = {
    "tie_word_embeddings": False,
    "text_config.tie_word_embeddings": False,
    "text_config.hidden_act": "silu",
    "text_config.rope_parameters.rope_type": "default",
    "vision_config.hidden_act": "silu",
    "vision_config.attention_bias": False,
}
"""Switches of the Hugging Face configuration that this project's model knows in one position only."""
Part = Literal["vision", "merger", "text"]


class TextShape(Config):
    """The decoder's numbers; names as Megatron's where they differ from Hugging Face's."""

    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    ffn_hidden_size: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    vocab_size: int = Field(ge=1)
    norm_epsilon: float = Field(gt=0)
    rotary_base: float = Field(gt=0)
    rotary_dim: int = Field(ge=2)
    """Channels of a head that are rotated (partial rotary), even."""
    mrope_section: tuple[int, int, int]
    """Frequencies that follow the time, row and column axis; they sum to rotary_dim / 2."""
    max_positions: int = Field(ge=1)

    @model_validator(mode="after")
    def _rotary_fits(self) -> TextShape:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} attention heads are not a multiple of {self.num_kv_heads} key/value heads")
        if self.rotary_dim > self.head_dim or 2 * sum(self.mrope_section) != self.rotary_dim:
            raise ValueError(
                f"mrope_section {list(self.mrope_section)} must sum to half of the {self.rotary_dim} rotated channels "
                f"(partial_rotary_factor x head_dim {self.head_dim})"
            )
        return self


class VisionShape(Config):
    """The vision tower's and the merger's numbers."""

    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    ffn_hidden_size: int = Field(ge=1)
    """Width of a block's gated MLP: Hugging Face's out_hidden_size."""
    num_heads: int = Field(ge=1)
    norm_epsilon: float = Field(gt=0)
    patch_size: int = Field(ge=1)
    temporal_patch_size: int = Field(ge=1)
    spatial_merge_size: int = Field(ge=1)
    position_grid: int = Field(ge=1)
    """Side of the square position table: image_size / patch_size."""
    out_hidden_size: int = Field(ge=1)
    """Width of a merged token: the decoder's hidden size."""
    merger_ffn_hidden_size: int = Field(ge=1)
    in_channels: int = Field(ge=1)

    @model_validator(mode="after")
    def _heads_fit(self) -> VisionShape:
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"vision width {self.hidden_size} is not {self.num_heads} heads of a multiple of 4 channels (two-axis rotary)"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch: channels x frames x rows x columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


class SpecialTokens(Config):
    """Token ids that the data pipeline and the model must agree on."""

    image: int
    video: int
    image_start: int
    image_end: int
    video_start: int
    video_end: int
    pad: int
    eos: tuple[int, ...]


class ModelShape(Config):
    """Everything that fixes the architecture."""

    text: TextShape
    vision: VisionShape
    tokens: SpecialTokens

    @model_validator(mode="after")
    def _parts_meet(self) -> ModelShape:
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(
                f"vision out_hidden_size {self.vision.out_hidden_size} differs from the decoder's width {self.text.hidden_size}"
            )
        return self

    @classmethod
    def from_hf(cls, hf: dict[str, Any], where: str) -> ModelShape:
        """Read a Hugging Face ``config.json`` tree.

        Raises:
            ConfigError: another model type or variant, a flat (pre-v5) file, a missing or impossible number; one line naming
                `where`.
        """
        kind = hf.get("model_type")
        if kind not in SUPPORTED:
            raise ConfigError(f"{where}: model_type {kind!r} is not supported; this project trains {', '.join(SUPPORTED)}")
        if "text_config" not in hf or "vision_config" not in hf:
            raise ConfigError(f"{where}: no nested text_config / vision_config; re-save it with transformers >= 5")
        for path, value in FIXED.items():
            found = _find(hf, path)
            if found not in (None, value):
                raise ConfigError(f"{where}: {path} is {found!r}; only {value!r}, as in every released GLM-4.1V, is supported")
        text, vision = hf["text_config"], hf["vision_config"]
        try:
            return cls(text=_text_shape(text), vision=_vision_shape(vision), tokens=_special_tokens(hf, text))
        except KeyError as error:
            raise ConfigError(f"{where}: the key {error.args[0]!r} is missing") from None
        except ValidationError as error:
            raise ConfigError(one_line(error, where)) from None


def _find(tree: Any, path: str) -> Any:
    """The value at a dotted path, or None."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _text_shape(text: dict[str, Any]) -> TextShape:
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    if text.get("head_dim", head_dim) != head_dim:
        raise ConfigError(
            f"text_config.head_dim: {text['head_dim']} is not hidden_size / num_attention_heads = {head_dim}; "
            "transformers' Glm4vTextAttention computes with the latter"
        )
    rope = text["rope_parameters"]
    return TextShape(
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        ffn_hidden_size=text["intermediate_size"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        head_dim=head_dim,
        vocab_size=text["vocab_size"],
        norm_epsilon=text["rms_norm_eps"],
        rotary_base=rope["rope_theta"],
        rotary_dim=int(head_dim * rope["partial_rotary_factor"]),
        mrope_section=tuple(rope["mrope_section"]),
        max_positions=text["max_position_embeddings"],
    )


def _vision_shape(vision: dict[str, Any]) -> VisionShape:
    return VisionShape(
        num_layers=vision["depth"],
        hidden_size=vision["hidden_size"],
        ffn_hidden_size=vision["out_hidden_size"],
        num_heads=vision["num_heads"],
        norm_epsilon=vision["rms_norm_eps"],
        patch_size=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        spatial_merge_size=vision["spatial_merge_size"],
        position_grid=vision["image_size"] // vision["patch_size"],
        out_hidden_size=vision["out_hidden_size"],
        merger_ffn_hidden_size=vision["intermediate_size"],
        in_channels=vision["in_channels"],
    )


def _special_tokens(hf: dict[str, Any], text: dict[str, Any]) -> SpecialTokens:
    eos = text.get("eos_token_id", hf.get("eos_token_id"))
    pad = text.get("pad_token_id", hf.get("pad_token_id"))
    if eos is None or pad is None:
        raise KeyError("eos_token_id" if eos is None else "pad_token_id")
    return SpecialTokens(
        image=hf["image_token_id"],
        video=hf["video_token_id"],
        image_start=hf["image_start_token_id"],
        image_end=hf["image_end_token_id"],
        video_start=hf["video_start_token_id"],
        video_end=hf["video_end_token_id"],
        pad=pad,
        eos=tuple(eos) if isinstance(eos, list | tuple) else (eos,),
    )


class ModelConfig(Config):
    """Which model, where its first weights come from, and which parts learn."""

    preset: str | None = None
    """A named set of numbers shipped with the package: a file of config/presets."""
    hf_folder: Path | None = None
    """A Hugging Face folder; its config.json gives the numbers and, with load_weights, its weights the start."""
    load_weights: bool = True
    """With hf_folder: start from its weights; false starts from random ones."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the random weights (not in the paper; Hugging Face's initializer_range)."""
    freeze: tuple[Part, ...] = ()
    """Parts that do not learn. Which parts learn in which stage is not in the paper."""
    lora: LoraConfig | None = None
    """Train low-rank adapters on chosen linear layers and nothing else; null: the weights themselves learn."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.preset is None) == (self.hf_folder is None):
            raise ValueError("give exactly one of preset and hf_folder")
        if set(self.freeze) == {"vision", "merger", "text"}:
            raise ValueError("freeze: every part is frozen, nothing would learn")
        if self.lora is not None and self.freeze:
            raise ValueError("freeze: with lora no weight learns anyway; leave it out and choose with lora.targets what learns")
        return self

    @cached_property
    def hf_config(self) -> dict[str, Any]:
        """The Hugging Face configuration tree that the numbers come from.

        Raises:
            ConfigError: no such preset or folder, or not JSON.
        """
        if self.preset is not None:
            path = PRESETS / f"{self.preset}.json"
            if not path.is_file():
                names = ", ".join(sorted(file.stem for file in PRESETS.glob("*.json")))
                raise ConfigError(f"model.preset: no preset {self.preset!r}; there are {names}")
        else:
            assert self.hf_folder is not None
            path = self.hf_folder / "config.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"model.hf_folder: {path} cannot be read ({error.strerror})") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"model.hf_folder: {path} is not JSON ({error})") from None

    @cached_property
    def shape(self) -> ModelShape:
        """The architecture's numbers."""
        return ModelShape.from_hf(self.hf_config, str(self.preset or self.hf_folder))
