"""What Transformer Engine asks of the device, and FP8 products of shapes, as rules that need neither.

Transformer Engine asserts these deep inside a layer, or in cuBLAS; here they are one line before the run starts.

Source: Transformer Engine 2.11: pytorch/utils.py (`assert_dim_for_fp8_exec`, `assert_dim_for_all_gather`),
common/gemm/cublaslt_gemm.cu (`CanonicalizeGemmInput`: leading dimensions of operands are multiples of 16, and the weight's
gradient has tokens as one), pytorch/tensor/float8_blockwise_tensor.py (`is_quantizable`: what is gathered among tensor ranks is
cut into blocks of 128 both ways), pytorch/quantization.py (`check_fp8_support`, `check_fp8_block_scaling_support`),
common/fused_attn/fused_attn.cpp (thd from sm_90 on), pytorch/attention/dot_product_attention/utils.py (not on sm_120).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_glmv.config.base import ConfigError
from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.parallel import ParallelConfig, PrecisionConfig, Recipe

FP8_MULTIPLE = 16
"""Tokens, and widths on one rank, of an FP8 product."""
BLOCK = 128
"""Side of a block of scales; what tensor ranks gather in block scaling comes in whole blocks."""
PACKED_CAPABILITY, UNPACKED_CAPABILITY = (9, 0), (12, 0)
"""Least compute capability for cuDNN's attention over packed rows (Hopper), and the one above it that lacks it."""
FP8_CAPABILITY, BLOCK_CAPABILITY, BLOCK_CUDA = (8, 9), (9, 0), (12, 9)
"""Least compute capability for FP8 products (Ada), for block scaling (Hopper), and the CUDA version that has the latter."""


@dataclass(frozen=True)
class Hardware:
    """What decides about FP8; known without importing torch, so that it can be given.

    Attributes:
        name: product name, for messages.
        capability: compute capability of the CUDA device; None: there is none.
        cuda: CUDA version that torch was built for.
        has_te: whether Transformer Engine can be imported.
        has_flash_attention: whether flash-attn can be imported, which Transformer Engine then uses.
    """

    name: str
    capability: tuple[int, int] | None
    cuda: tuple[int, int] | None
    has_te: bool
    has_flash_attention: bool = False

    @property
    def attends_packed_rows(self) -> bool:
        """Whether Transformer Engine has fused attention over packed rows; without, it pads each segment to the longest."""
        if self.capability is None:
            return False
        return self.has_flash_attention or (self.capability >= PACKED_CAPABILITY and self.capability != UNPACKED_CAPABILITY)


class Usable(NamedTuple):
    """What a device makes of a configuration."""

    precision: PrecisionConfig
    notes: tuple[str, ...]
    """One line for each thing that is done otherwise than configured."""


def usable_precision(precision: PrecisionConfig, hardware: Hardware) -> Usable:
    """Replace what the device cannot compute: block scaling by current, FP8 by bf16, Transformer Engine's layers by torch's.

    Raises:
        ConfigError: ``layers: te`` where there is no CUDA device, no Transformer Engine, or no attention over packed rows.
    """
    te = hardware.has_te and hardware.capability is not None
    if precision.layers == "te" and not te:
        raise ConfigError(
            "precision.layers: Transformer Engine needs a CUDA device and the package; install the gpu extra, or use auto"
        )
    changes: dict[str, Any] = {}
    notes = []
    if te and precision.layers_on_gpu == "te" and not hardware.attends_packed_rows:
        reason = f"on {hardware.name} Transformer Engine attends over packed rows with flash-attn only, which is not installed"
        if precision.layers == "te":
            raise ConfigError(f"precision.layers: {reason}; install it, or use auto")
        changes["layers"] = "torch"
        notes.append(f"precision.layers: {reason}; going on with torch's layers")
    for tower, recipe in (("text", precision.fp8_text), ("vision", precision.fp8_vision)):
        usable, reason = _usable_recipe(recipe, hardware)
        if usable == recipe:
            continue
        changes[f"fp8_{tower}"] = usable
        if usable == "off":
            changes[f"bf16_ends_{tower}"] = (0, 0)
        instead = "bf16" if usable == "off" else f"{usable} scaling"
        notes.append(f"precision.fp8_{tower}: {recipe} scaling {reason}; going on with {instead}")
    return Usable(precision.model_copy(update=changes), tuple(notes))


def _usable_recipe(recipe: Recipe, hardware: Hardware) -> tuple[Recipe, str]:
    """The recipe that the device computes instead, and why."""
    if recipe == "off":
        return recipe, ""
    if hardware.capability is None:
        return "off", "needs a CUDA device, and there is none"
    if not hardware.has_te:
        return "off", "needs Transformer Engine, which is not installed (the gpu extra has it)"
    here = f"{hardware.name} has {'.'.join(map(str, hardware.capability))}"
    if not hardware.attends_packed_rows:
        return "off", "needs Transformer Engine's layers"
    if hardware.capability < FP8_CAPABILITY:
        return "off", f"needs compute capability {'.'.join(map(str, FP8_CAPABILITY))}, {here}"
    if recipe == "block" and hardware.capability < BLOCK_CAPABILITY:
        return "current", f"needs compute capability {'.'.join(map(str, BLOCK_CAPABILITY))}, {here}"
    if recipe == "block" and (hardware.cuda is None or hardware.cuda < BLOCK_CUDA):
        version = ".".join(map(str, hardware.cuda)) if hardware.cuda else "none"
        return "current", f"needs a torch built for CUDA {'.'.join(map(str, BLOCK_CUDA))}, this one is for {version}"
    return recipe, ""


def token_multiple(recipe: Recipe, *, gathered: bool) -> int:
    """What one tensor rank's tokens are a multiple of in a tower with this recipe.

    Args:
        recipe: of the tower.
        gathered: whether tensor ranks hold parts of the tokens (sequence parallelism) and gather them before a product.
    """
    if recipe == "off":
        return 1
    return BLOCK if recipe == "block" and gathered else FP8_MULTIPLE


def merged_multiple(precision: PrecisionConfig, layout: ParallelConfig) -> int:
    """What one rank's merged tokens are padded to a multiple of; its patches are four times as many."""
    return token_multiple(precision.fp8_vision, gathered=layout.sequence_parallel and layout.vision_tensor > 1)


def trained_multiple(precision: PrecisionConfig, layout: ParallelConfig) -> int:
    """What one tensor rank's tokens behind the last attention are a multiple of; in bf16, too, products like such shapes."""
    return max(FP8_MULTIPLE, token_multiple(precision.fp8_text, gathered=layout.sequence_parallel and layout.tensor > 1))


def row_multiple(precision: PrecisionConfig, layout: ParallelConfig) -> int:
    """What FP8 in the decoder asks the tokens of a row to be a multiple of; 1 without."""
    if precision.fp8_text == "off":
        return 1
    shares = layout.context * (layout.tensor if layout.sequence_parallel else 1)
    return shares * token_multiple(precision.fp8_text, gathered=layout.sequence_parallel)


def check_fp8(shape: ModelShape, layout: ParallelConfig, precision: PrecisionConfig) -> None:
    """Refuse widths and numbers of layers that FP8 products do not admit in this layout.

    Raises:
        ConfigError: one line with the key, the number and what to do.
    """
    for tower, recipe, ends, layers in (
        ("text", precision.fp8_text, precision.bf16_ends_text, shape.text.num_layers // layout.pipeline),
        ("vision", precision.fp8_vision, precision.bf16_ends_vision, shape.vision.num_layers),
    ):
        if max(ends) > layers:
            where = "of one pipeline stage" if tower == "text" and layout.pipeline > 1 else "of the tower"
            raise ConfigError(f"precision.bf16_ends_{tower}: {max(ends)} layers are more than the {layers} {where}")
        if recipe == "off":
            continue
        blocks = recipe == "block" and layout.sequence_parallel and (tower == "text" or layout.vision_tensor > 1)
        for name, width, gathered in _widths(shape, layout, tower):
            unit = BLOCK if gathered and blocks else FP8_MULTIPLE
            if width % unit:
                raise ConfigError(
                    f"precision.fp8_{tower}: {name} of {width} on one rank is not a multiple of {unit}, which {recipe} scaling "
                    "needs; use off, or fewer tensor ranks"
                )


def _widths(shape: ModelShape, layout: ParallelConfig, tower: str) -> Iterator[tuple[str, int, bool]]:
    """Name, width on one rank, and whether tensor ranks gather it, of what FP8 products read and write."""
    text, vision = shape.text, shape.vision
    if tower == "text":
        yield "a hidden size", text.hidden_size, True
        yield "an attention width", text.num_heads * text.head_dim // layout.tensor, False
        yield "a key/value width", max(1, text.num_kv_heads // layout.tensor) * text.head_dim, False
        yield "an MLP width", text.ffn_hidden_size // layout.tensor, False
        return
    yield "a hidden size", vision.hidden_size, True
    yield "an attention width", vision.hidden_size // layout.vision_tensor, False
    yield "an MLP width", vision.ffn_hidden_size // layout.vision_tensor, False
    yield "a merger's hidden size", vision.out_hidden_size, True
    yield "a merger's MLP width", vision.merger_ffn_hidden_size // layout.vision_tensor, False
