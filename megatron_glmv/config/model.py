"""The model's numbers, read from a Hugging Face ``config.json`` or a named preset, never retyped.

Files come in two nested layouts: transformers 5 writes all rotary numbers into `rope_parameters`, transformers 4 wrote
`rope_theta` and `partial_rotary_factor` beside a `rope_scaling`. Both are read as transformers 5 reads them.

Source: transformers 5.23.0, models/glm4v/configuration_glm4v.py and models/glm46v/configuration_glm46v.py (names, meaning,
defaults), modeling_rope_utils.py (`convert_rope_params_to_dict`); a file saved by transformers 4.57.1 (the older layout).
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
"""glm-4.1v-9b is GLM-4.1V-9B-Base and GLM-4.1V-9B-Thinking: one architecture, two sets of weights. glm-4.6v-flash differs from
it in rotary base, context and tokens. digits is the quickstart's."""
ModelType = Literal["glm4v", "glm46v"]
"""Hugging Face's classes of the dense models; glm46v wraps the decoder and vision tower of glm4v, so both compute the same."""
FIXED = {
    "tie_word_embeddings": False,
    "text_config.model_type": "glm4v_text",
    "text_config.tie_word_embeddings": False,
    "text_config.hidden_act": "silu",
    "text_config.rope_parameters.rope_type": "default",
    "vision_config.hidden_act": "silu",
    "vision_config.attention_bias": False,
    "vision_config.rope_theta": 10000.0,
    "vision_config.rope_parameters.rope_theta": 10000.0,
}
"""Switches of the Hugging Face configuration that this project's model knows in one position only."""
VISION_TYPES = {"glm4v": ("glm4v_vision", "glm4v"), "glm46v": ("glm4v_vision",)}
"""What vision_config.model_type may say. transformers 4 wrote glm4v; in glm46v, transformers 5 takes that for a whole model."""
TOKENS = {
    "glm4v": {"image": 151343, "video": 151344, "image_start": 151339, "image_end": 151340, "video_start": 151341,
              "video_end": 151342},
    "glm46v": {"image": 151343, "video": 151344, "image_start": 151339, "image_end": 151340, "video_start": 151361,
               "video_end": 151362},
}  # fmt: skip
"""The ids that transformers takes where a file names none; released GLM-4.6V files name other ones."""
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

    model_type: ModelType = "glm4v"
    """Which of Hugging Face's classes an exported folder names; the function is the same."""
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
        kind = _check_type(hf, where)
        if not isinstance(hf.get("text_config"), dict) or not isinstance(hf.get("vision_config"), dict):
            raise ConfigError(f"{where}: no nested text_config / vision_config; re-save it with transformers >= 5")
        text, vision = dict(hf["text_config"]), hf["vision_config"]
        text["rope_parameters"] = _rotary(text)
        for path, value in FIXED.items():
            found = _find({**hf, "text_config": text}, path)
            if found not in (None, value):
                raise ConfigError(f"{where}: {path} is {found!r}; only {value!r}, as in every released GLM-4.1V, is supported")
        try:
            return cls(
                model_type=kind,
                text=_text_shape(text, where),
                vision=_vision_shape(vision),
                tokens=_special_tokens(hf, text, TOKENS[kind]),
            )
        except KeyError as error:
            raise ConfigError(f"{where}: the key {error.args[0]!r} is missing") from None
        except ValidationError as error:
            raise ConfigError(one_line(error, where)) from None


def _check_type(hf: dict[str, Any], where: str) -> ModelType:
    """The model type of a dense member of the family."""
    kind, text_type = hf.get("model_type"), str(_find(hf, "text_config.model_type"))
    for name, found in (("model_type", str(kind)), ("text_config.model_type", text_type)):
        if found.startswith(("glm4v_moe", "glm46v_moe")):
            raise ConfigError(
                f"{where}: {name} {found!r} is a mixture of experts (GLM-4.5V, GLM-4.6V), which this project does not have; "
                f"it trains the dense models, {' and '.join(TOKENS)}"
            )
    if kind != "glm4v" and kind != "glm46v":
        raise ConfigError(f"{where}: model_type {kind!r} is not supported; this project trains {' and '.join(TOKENS)}")
    vision_type = _find(hf, "vision_config.model_type")
    if vision_type is not None and vision_type not in VISION_TYPES[kind]:
        raise ConfigError(f"{where}: vision_config.model_type is {vision_type!r}; a {kind} model has {VISION_TYPES[kind][0]!r}")
    return kind


def _rotary(text: dict[str, Any]) -> dict[str, Any] | None:
    """The decoder's rotary parameters in the layout of transformers 5; None when the file says nothing about them."""
    named = text.get("rope_scaling") or text.get("rope_parameters")
    beside = {key: text[key] for key in ("rope_theta", "partial_rotary_factor") if text.get(key) is not None}
    if not named and not beside:
        return None
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, "mrope_section": [8, 12, 12], **beside, **(named or {})}
    return {"rope_type": rope.get("type", "default"), **rope}


def _find(tree: Any, path: str) -> Any:
    """The value at a dotted path, or None."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _text_shape(text: dict[str, Any], where: str) -> TextShape:
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    if (text.get("head_dim") or head_dim) != head_dim:
        raise ConfigError(
            f"{where}: text_config.head_dim: {text['head_dim']} is not hidden_size / num_attention_heads = {head_dim}; "
            "transformers' Glm4vTextAttention computes with the latter"
        )
    rope = text["rope_parameters"]
    if rope is None:
        raise KeyError("rope_parameters")
    return TextShape(
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        ffn_hidden_size=text["intermediate_size"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        head_dim=head_dim,
        vocab_size=text["vocab_size"],
        norm_epsilon=text.get("rms_norm_eps", 1e-5),
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
        norm_epsilon=vision.get("rms_norm_eps", 1e-5),
        patch_size=vision["patch_size"],
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        spatial_merge_size=vision.get("spatial_merge_size", 2),
        position_grid=vision["image_size"] // vision["patch_size"],
        out_hidden_size=vision["out_hidden_size"],
        merger_ffn_hidden_size=vision["intermediate_size"],
        in_channels=vision.get("in_channels", 3),
    )


def _special_tokens(hf: dict[str, Any], text: dict[str, Any], defaults: dict[str, int]) -> SpecialTokens:
    named: dict[str, Any] = {key: text.get(key, hf.get(key)) for key in ("eos_token_id", "pad_token_id")}
    for key, value in named.items():
        if value is None:
            raise KeyError(key)
    eos = named["eos_token_id"]
    media = {name: hf.get(f"{name}_token_id", default) for name, default in defaults.items()}
    return SpecialTokens(**media, pad=named["pad_token_id"], eos=tuple(eos) if isinstance(eos, list | tuple) else (eos,))


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
