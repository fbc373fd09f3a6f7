"""How one model replica is cut over ranks, and which layouts a model admits.

Source: the layouts of the paper (tensor 2; context 4 for 32,768 tokens) are in section 3 of arXiv 2507.01006.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, model_validator

from megatron_glmv.config.base import Config, ConfigError
from megatron_glmv.config.model import ModelShape


class ParallelConfig(Config):
    """The layout; the data-parallel size is what remains of the ranks."""

    tensor: int = Field(default=1, ge=1)
    """Ranks that share each layer's matrices, in both towers."""
    sequence: bool = True
    """Shard activations between layers over the tensor ranks too (Megatron's sequence parallelism); no effect at tensor 1."""
    pipeline: int = Field(default=1, ge=1)
    """Stages that the decoder's layers are divided into; the vision tower runs on the first."""
    first_stage_layers: int | None = Field(default=None, ge=0)
    """Decoder layers of the first stage, which also runs the vision tower; 0: the tower alone; null: as many as the others."""
    last_stage_layers: int | None = Field(default=None, ge=1)
    """Decoder layers of the last stage, which also computes logits and losses; null: as many as other stages."""
    virtual_pipeline: int = Field(default=1, ge=1)
    """Model chunks of each stage (interleaved schedule); 1 is the plain 1F1B schedule."""
    context: int = Field(default=1, ge=1)
    """Ranks that share each row's tokens."""
    vision: Literal["tensor", "images"] = "tensor"
    """How the ranks of a first stage share the vision tower and the merger. tensor: as they share the decoder, by tensor
    parallelism, each context rank for itself. images: every tensor and context rank holds both whole and encodes a share of a
    row's frames, dealt by cost; nothing is exchanged within their layers, features are gathered once, and the memory of both
    is that of one rank."""
    expert: int = Field(default=1, ge=1)
    """Expert parallelism; only 1: the dense models have no experts."""
    distributed_optimizer: bool = True
    """Shard optimizer state over the data-parallel ranks."""
    overlap: bool = True
    """Overlap gradient reduction (and, with the distributed optimizer, parameter gathering) with computation."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds without progress after which a rank reports who is behind and ends."""

    @model_validator(mode="after")
    def _possible(self) -> ParallelConfig:
        if self.expert != 1:
            raise ValueError("expert: expert parallelism is not available (the dense GLM-4.1V has no experts); set it to 1")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError("virtual_pipeline: needs pipeline > 1")
        for key, layers in (("first_stage_layers", self.first_stage_layers), ("last_stage_layers", self.last_stage_layers)):
            if layers is not None and self.pipeline == 1:
                raise ValueError(f"{key}: needs pipeline > 1")
        if self.first_stage_layers == 0 and self.virtual_pipeline > 1:
            raise ValueError(
                "first_stage_layers: 0 leaves the first stage one chunk, the vision tower's; set virtual_pipeline to 1, or "
                "first_stage_layers to a multiple of it"
            )
        return self

    @property
    def model_ranks(self) -> int:
        """Ranks of one model replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations are really sharded over tensor ranks."""
        return self.sequence and self.tensor > 1

    @property
    def needs_one_queue(self) -> bool:
        """Whether what tensor and context ranks exchange behind products hides only if it starts first, as one queue has it."""
        return self.tensor > 1 or self.context > 1

    @property
    def vision_tensor(self) -> int:
        """Ranks that share the matrices of the vision tower and the merger."""
        return self.tensor if self.vision == "tensor" else 1

    @property
    def row_alignment(self) -> int:
        """Documents of a row must start at multiples of this many tokens, so that context ranks cut each evenly."""
        return 2 * self.context if self.context > 1 else 1

    def check_model(self, shape: ModelShape) -> None:
        """Refuse a layout that the model cannot be cut into.

        Raises:
            ConfigError: one line with the key, the number that does not divide and what to use.
        """
        text, vision = shape.text, shape.vision
        for what, count in (
            ("decoder attention heads", text.num_heads),
            ("decoder MLP width", text.ffn_hidden_size),
            ("vocabulary", text.vocab_size),
            ("ViT attention heads", vision.num_heads),
            ("ViT MLP width", vision.ffn_hidden_size),
            ("merger MLP width", vision.merger_ffn_hidden_size),
        ):
            of_vision = not what.startswith(("decoder", "vocabulary"))
            if count % (self.vision_tensor if of_vision else self.tensor):
                other = ", or parallel.vision=images" if of_vision else ""
                raise ConfigError(
                    f"parallel.tensor: {count} {what} cannot be divided over {self.tensor} tensor ranks; "
                    f"use one of {_divisors(count)}{other}"
                )
        larger, smaller = max(text.num_kv_heads, self.tensor), min(text.num_kv_heads, self.tensor)
        if larger % smaller:
            raise ConfigError(
                f"parallel.tensor: {text.num_kv_heads} key/value heads and {self.tensor} tensor ranks do not divide each other"
            )
        self.stage_layers(text.num_layers)

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers of each pipeline stage, over all its chunks.

        Args:
            num_layers: of the whole decoder.

        Raises:
            ConfigError: the layers that no key gives to a stage do not divide over the stages that are left, or a stage's
                layers do not divide over its chunks.
        """
        ends = {0: self.first_stage_layers, self.pipeline - 1: self.last_stage_layers}
        fixed = {stage: layers for stage, layers in ends.items() if layers is not None}
        left, stages = num_layers - sum(fixed.values()), self.pipeline - len(fixed)
        if not fixed and num_layers % (self.pipeline * self.virtual_pipeline):
            raise ConfigError(
                f"parallel.pipeline: {num_layers} decoder layers cannot be divided over pipeline {self.pipeline} x "
                f"virtual_pipeline {self.virtual_pipeline} = {self.pipeline * self.virtual_pipeline} chunks; use a product "
                f"among {_divisors(num_layers)}, or an uneven split: {self._splits(num_layers)}"
            )
        key = "first_stage_layers" if self.first_stage_layers is not None else "last_stage_layers"
        if left < 0 or (left == 0) != (stages == 0) or (stages and left % stages):
            given = " and ".join(f"{layers} on stage {stage}" for stage, layers in fixed.items())
            raise ConfigError(
                f"parallel.{key}: with {given}, {max(left, 0)} of {num_layers} decoder layers are left for {stages} "
                f"stage{'s' if stages != 1 else ''} and do not divide evenly; possible: {self._splits(num_layers)}"
            )
        layers = tuple(fixed.get(stage, left // stages if stages else 0) for stage in range(self.pipeline))
        if uneven := next((count for count in layers if count % self.virtual_pipeline), 0):
            raise ConfigError(
                f"parallel.{key}: a stage of {uneven} decoder layers cannot be divided into virtual_pipeline "
                f"{self.virtual_pipeline} equal chunks, as Megatron needs; possible: {self._splits(num_layers)}"
            )
        return layers

    def chunk_layers(self, num_layers: int, stage: int, chunk: int = 0) -> range:
        """Numbers, from 0, of the decoder layers that one chunk of one pipeline stage holds.

        Args:
            num_layers: of the whole decoder.
            stage: 0 .. pipeline - 1.
            chunk: 0 .. virtual_pipeline - 1; the layers go once through all stages for each chunk.

        Raises:
            ConfigError: as `stage_layers`.
        """
        sizes = [layers // self.virtual_pipeline for layers in self.stage_layers(num_layers)]
        start = chunk * sum(sizes) + sum(sizes[:stage])
        return range(start, start + sizes[stage])

    def _splits(self, num_layers: int) -> str:
        """Values of first_stage_layers that leave an equal number of layers, divisible into chunks, to every other stage."""
        unit, others = self.virtual_pipeline, self.pipeline - 1
        last = self.last_stage_layers
        room, middle = num_layers - (last or 0), others - (last is not None)
        found = [
            first
            for first in range(0 if unit == 1 else unit, room + 1, unit)
            if (room > first and (room - first) % (middle * unit) == 0 if middle else room == first)
        ]
        return (
            "first_stage_layers " + (", ".join(map(str, found)) or "none") + (f" with last_stage_layers {last}" if last else "")
        )


Recipe = Literal["off", "delayed", "current", "block"]
"""How the scales of FP8 operands are found; off: bf16."""


class PrecisionConfig(Config):
    """Number formats."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Weights and activations; bf16 keeps fp32 main copies in the optimizer (not in the paper)."""
    layers: Literal["auto", "te", "torch"] = "auto"
    """Layer spec: te = Transformer Engine, torch = plain torch; auto takes te in bf16 on CUDA where it is installed (its fused
    attention knows 16-bit formats only)."""
    fp8_text: Recipe = "off"
    """FP8 products in the decoder's layers (te only; not in the paper). delayed scales a tensor by its largest value in earlier
    micro-batches, current by that of now, block every 128 activations and 128 x 128 weights apart. Where the device cannot, the
    run says so in one line and goes on with current, or in bf16."""
    fp8_vision: Recipe = "off"
    """The same for the vision tower's layers and the merger's MLP."""
    bf16_ends_text: tuple[NonNegativeInt, NonNegativeInt] = (0, 0)
    """With fp8_text: so many first and last layers of the decoder compute in bf16 (not with delayed)."""
    bf16_ends_vision: tuple[NonNegativeInt, NonNegativeInt] = (0, 0)
    """The same for the vision tower."""

    @property
    def layers_on_gpu(self) -> Literal["te", "torch"]:
        """The layer spec on a CUDA device with Transformer Engine."""
        if self.layers == "auto":
            return "te" if self.dtype == "bf16" else "torch"
        return self.layers

    @property
    def uses_fp8(self) -> bool:
        """Whether either tower computes in FP8."""
        return self.fp8_text != "off" or self.fp8_vision != "off"

    @model_validator(mode="after")
    def _te_goes_with_its_formats(self) -> PrecisionConfig:
        if self.uses_fp8:
            if self.layers == "torch":
                raise ValueError("fp8_text / fp8_vision: FP8 needs Transformer Engine; set layers to te or auto")
            if self.dtype != "bf16":
                raise ValueError("fp8_text / fp8_vision: FP8 needs dtype bf16")
        if self.layers == "te" and self.dtype != "bf16":
            raise ValueError(
                "layers: Transformer Engine attends over packed rows in 16 bits only; set dtype bf16, or layers auto"
            )
        return self

    @model_validator(mode="after")
    def _ends_beside_fp8(self) -> PrecisionConfig:
        for tower, recipe, ends in (
            ("text", self.fp8_text, self.bf16_ends_text),
            ("vision", self.fp8_vision, self.bf16_ends_vision),
        ):
            if any(ends) and recipe == "off":
                raise ValueError(f"bf16_ends_{tower}: all layers compute in bf16 already; it needs fp8_{tower}")
            if any(ends) and recipe == "delayed":
                raise ValueError(f"bf16_ends_{tower}: delayed scaling takes all layers in FP8 or none; use current or block")
        return self


class RecomputeConfig(Config):
    """Activation recomputation, per tower (not in the paper)."""

    text: Literal["none", "selective", "full"] = "none"
    """none keeps all activations; selective recomputes core attention; full recomputes whole layers."""
    vision: Literal["none", "selective", "full"] = "none"
    """The same for the vision tower."""


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, min(number, 64) + 1) if number % n == 0)
