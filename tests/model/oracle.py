"""Random tiny Hugging Face models and their logits, losses and gradients on named cases: the reference of the parity tests.

transformers is the definition of the function that this project's model must compute, so nothing here restates the model: the
random weights are only chosen large enough that every part of it moves the logits.

Source: transformers 5.23.0, models/glm4v/modeling_glm4v.py and models/glm46v/modeling_glm46v.py. `forward` refuses image and
video in one document (both use the image token), so mixed documents are fed embeddings and positions by hand; for image-only
documents that equals the ordinary call bit for bit. Packed rows have no reference of their own: each document runs alone,
unpadded and without a cache.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageTextToText, Glm4vConfig, Glm4vForConditionalGeneration, Glm46VConfig

from megatron_glmv.config.model import PRESETS, ModelShape
from megatron_glmv.sequence.packed import Document

VARIANTS = ("digits", "grouped", "flash")
"""digits: the preset. grouped: other head grouping, layer counts, query width, table, rotary base and sections. flash: the
class of GLM-4.6V, the rotary base of GLM-4.6V-Flash and, as there, other media tokens and fewer stops than GLM-4.1V. Beside
them, deep is digits with 8 decoder layers, enough for every kind of pipeline."""
CONFIGS = {"glm4v": Glm4vConfig, "glm46v": Glm46VConfig}

SQRT_EPSILON = math.sqrt(1e-5)

_GROUPED_TEXT = {
    "hidden_size": 144,
    "intermediate_size": 240,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 24,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 500000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 3, 2],
    },
}
_GROUPED_VISION = {
    "depth": 3,
    "hidden_size": 72,
    "num_heads": 3,
    "image_size": 84,
    "out_hidden_size": 144,
    "intermediate_size": 168,
}
_FLASH = {
    "model_type": "glm46v",
    "architectures": ["Glm46VForConditionalGeneration"],
    "image_token_id": 21,
    "video_token_id": 22,
}


@dataclass(frozen=True)
class Image:
    """A picture of `rows` x `columns` patches in a document's script."""

    rows: int
    columns: int


@dataclass(frozen=True)
class Video:
    """A video of `frames` temporal patches of `rows` x `columns` patches in a document's script."""

    frames: int
    rows: int
    columns: int


Media = Image | Video
Script = Sequence[int | Media]
"""A document in short: a number is that many random text tokens."""


@dataclass(frozen=True)
class Case:
    """One row to compare. N = patches of all documents.

    Attributes:
        name: for messages.
        documents: the samples of the row; more than one is a packed row.
        media: of each document, in token order.
        patches: [N, patch_dim] float32, normalised, in token order.
    """

    name: str
    documents: list[Document]
    media: list[tuple[Media, ...]]
    patches: Tensor


SCRIPTS: dict[str, tuple[Script, ...]] = {
    "text_only": ((24,),),
    "one_image": ((5, Image(8, 8), 7),),
    "several_images": ((3, Image(4, 6), 2, Image(10, 4), Image(2, 2), 4, Image(14, 16), 6),),
    "very_long_image": ((4, Image(2, 40), 6),),
    "very_tall_image": ((4, Image(40, 2), 6),),
    "video_frames": ((6, Video(3, 6, 8), 7),),
    "video_before_image": ((3, Video(2, 4, 4), 2, Image(6, 4), 5),),
    "image_before_video": ((3, Image(6, 4), 2, Video(3, 4, 6), 5),),
    "long_prompt": ((300, Image(6, 6), 150),),
    "two_documents": ((4, Image(4, 6), 9), (7, Image(6, 4), 2, Image(4, 4), 3)),
    "mixed_documents": ((11,), (2, Video(2, 4, 6), 3, Image(4, 4), 5), (4, Image(8, 2), 6)),
}
"""Every case by name. Some bugs show in one only: feature order in video_before_image, the document mask in packed rows."""


def hf_config(variant: str) -> dict[str, Any]:
    """The nested configuration tree of a variant."""
    tree = json.loads((PRESETS / "digits.json").read_text(encoding="utf-8"))
    if variant == "grouped":
        tree["text_config"].update(copy.deepcopy(_GROUPED_TEXT))
        tree["vision_config"].update(_GROUPED_VISION)
    elif variant == "flash":
        tree.update(_FLASH)
        tree["text_config"]["eos_token_id"] = [1, 8, 10]
        tree["text_config"]["rope_parameters"]["rope_theta"] = 500000.0
    elif variant == "deep":
        tree["text_config"]["num_hidden_layers"] = 8
    elif variant != "digits":
        raise ValueError(f"variant {variant!r}; there are {', '.join(VARIANTS)}, deep")
    return tree


def model_shape(variant: str) -> ModelShape:
    """The numbers of a variant."""
    return ModelShape.from_hf(hf_config(variant), variant)


def random_model(
    variant: str = "digits", seed: int = 0, *, epsilon_probe: bool = False, attention: str = "sdpa"
) -> Glm4vForConditionalGeneration:
    """A float32 model in eval mode whose logits have a standard deviation of about 1.4.

    Args:
        variant: one of `VARIANTS`.
        seed: of the weights.
        epsilon_probe: shrink the input of every norm to about sqrt(1e-5), so that a wrong epsilon moves the logits by more
            than 1; on ordinary weights it cannot be seen.
        attention: transformers' attention implementation, sdpa or eager.
    """
    tree = hf_config(variant)
    config = CONFIGS[tree["model_type"]](**tree)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    small = SQRT_EPSILON if epsilon_probe else 1.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(_random_weight(name, noise, small))
    return model.eval().requires_grad_(True)


SHRUNK = (
    "embed_tokens.weight",
    "post_self_attn_layernorm.weight",
    "post_mlp_layernorm.weight",
    "o_proj.weight",
    "language_model.layers.N.mlp.down_proj.weight",
    "patch_embed.proj.weight",
    "patch_embed.proj.bias",
    "post_conv_layernorm.weight",
    "position_embedding.weight",
    "attn.proj.weight",
    "visual.blocks.N.mlp.down_proj.weight",
    "merger.proj.weight",
    "merger.down_proj.weight",
)
"""What writes the inputs of norms and the residual streams: the epsilon probe scales these."""


def _random_weight(name: str, noise: Tensor, small: float) -> Tensor:
    pattern = ".".join("N" if part.isdigit() else part for part in name.split("."))
    scale = small if pattern.endswith(SHRUNK) else 1.0
    if name == "lm_head.weight":
        return noise * (1.4 / math.sqrt(noise.shape[1]))
    if name.endswith("embed_tokens.weight"):
        return noise * scale
    if "position_embedding" in name:
        return noise * (0.7 * scale)
    if name.endswith("bias"):
        return noise * (0.3 * scale)
    if noise.ndim == 1:
        return (1.0 + 0.3 * noise) * scale
    gain = {"merger.down_proj.weight": 3.0, "q_proj.weight": 1.5, "k_proj.weight": 1.5}
    factor = next((value for end, value in gain.items() if name.endswith(end)), 1.0)
    return noise * (factor * scale / math.sqrt(noise[0].numel()))


def make_case(name: str, shape: ModelShape, scripts: Sequence[Script], seed: int = 0) -> Case:
    """A case of random tokens, weights and patches from its documents' scripts."""
    rng = np.random.default_rng([seed, *name.encode()])
    documents, media = [], []
    for number, script in enumerate(scripts):
        documents.append(_document(rng, shape, script, f"{name}-{number}"))
        media.append(tuple(part for part in script if not isinstance(part, int)))
    num_patches = sum(rows * columns for document in documents for rows, columns in document.frames)
    values = rng.standard_normal((num_patches, shape.vision.patch_dim), dtype=np.float32)
    return Case(name, documents, media, torch.from_numpy(values))


@lru_cache(maxsize=8)
def all_cases(shape: ModelShape, seed: int = 0) -> dict[str, Case]:
    """Every case of `SCRIPTS` for one architecture."""
    return {name: make_case(name, shape, scripts, seed) for name, scripts in SCRIPTS.items()}


def _document(rng: np.random.Generator, shape: ModelShape, script: Script, key: str) -> Document:
    special, merge = shape.tokens, shape.vision.spatial_merge_size
    first_word = max(special.image, special.video, special.image_end, special.video_end, *special.eos) + 1

    def words(count: int) -> list[int]:
        return [int(word) for word in rng.integers(first_word, shape.text.vocab_size, count)]

    tokens: list[int] = []
    frames: list[tuple[int, int]] = []
    for part in script:
        if isinstance(part, int):
            tokens += words(part)
            continue
        pictured = [special.image_start, *[special.image] * (part.rows * part.columns // merge**2), special.image_end]
        if isinstance(part, Image):
            tokens += pictured
            frames.append((part.rows, part.columns))
        else:
            stamped = [token for _ in range(part.frames) for token in (*pictured, *words(1))]
            tokens += [special.video_start, *stamped, special.video_end]
            frames += [(part.rows, part.columns)] * part.frames
    weights = rng.uniform(0.25, 1.0, len(tokens)) * (rng.random(len(tokens)) < 0.7)
    return Document(np.array(tokens, dtype=np.int64), weights.astype(np.float32), tuple(frames), key)


@dataclass(frozen=True)
class DocumentInputs:
    """One document as transformers takes it, a batch of one.

    Attributes:
        input_ids: [1, n] int64.
        types: [1, n] int64; 0 text, 1 image, 2 video.
        image_patches: [Ni, patch_dim] or None.
        image_grids: [images, 3] or None.
        video_patches: [Nv, patch_dim] or None.
        video_grids: [videos, 3] or None.
    """

    input_ids: Tensor
    types: Tensor
    image_patches: Tensor | None
    image_grids: Tensor | None
    video_patches: Tensor | None
    video_grids: Tensor | None


def document_inputs(case: Case, shape: ModelShape) -> list[DocumentInputs]:
    """Every document of a case as transformers takes it."""
    found, start = [], 0
    for document, media in zip(case.documents, case.media, strict=True):
        grids: dict[type, list[list[int]]] = {Image: [], Video: []}
        patches: dict[type, list[Tensor]] = {Image: [], Video: []}
        for part in media:
            grid = [part.frames if isinstance(part, Video) else 1, part.rows, part.columns]
            grids[type(part)].append(grid)
            patches[type(part)].append(case.patches[start : start + math.prod(grid)])
            start += math.prod(grid)
        input_ids = torch.as_tensor(document.tokens).long()[None]
        found.append(
            DocumentInputs(
                input_ids,
                token_types(input_ids, shape),
                *(
                    value
                    for kind in (Image, Video)
                    for value in ((torch.cat(patches[kind]), torch.tensor(grids[kind])) if grids[kind] else (None, None))
                ),
            )
        )
    return found


def token_types(input_ids: Tensor, shape: ModelShape) -> Tensor:
    """Hugging Face's mm_token_type_ids, like `input_ids`: image tokens are 2 between a video's begin and end, else 1."""
    special = shape.tokens
    in_video = (input_ids == special.video_start).cumsum(-1) > (input_ids == special.video_end).cumsum(-1)
    return (input_ids == special.image) * torch.where(in_video, 2, 1)


def rope_positions(model: Glm4vForConditionalGeneration, inputs: DocumentInputs) -> Tensor:
    """The positions that transformers gives a document, [3, 1, n] int64."""
    positions, _ = model.model.get_rope_index(
        inputs.input_ids, inputs.types, image_grid_thw=inputs.image_grids, video_grid_thw=inputs.video_grids
    )
    return positions


def document_logits(model: Glm4vForConditionalGeneration, inputs: DocumentInputs) -> Tensor:
    """Logits of one document, [n, vocab], differentiable."""
    positions = rope_positions(model, inputs)
    if inputs.image_patches is None or inputs.video_patches is None:
        output = model(
            input_ids=inputs.input_ids,
            pixel_values=inputs.image_patches,
            image_grid_thw=inputs.image_grids,
            pixel_values_videos=inputs.video_patches,
            video_grid_thw=inputs.video_grids,
            mm_token_type_ids=inputs.types,
            position_ids=positions,
            use_cache=False,
        )
        return output.logits[0]
    return mixed_logits(model, inputs, positions)


def mixed_logits(model: Glm4vForConditionalGeneration, inputs: DocumentInputs, positions: Tensor) -> Tensor:
    """Logits of a document with embeddings and positions fed by hand, [n, vocab]; the only way to mix image and video."""
    embeddings = model.get_input_embeddings()(inputs.input_ids)
    if inputs.image_patches is not None:
        features = model.model.get_image_features(inputs.image_patches, inputs.image_grids).pooler_output
        embeddings = embeddings.masked_scatter((inputs.types == 1)[..., None], torch.cat(features))
    if inputs.video_patches is not None:
        features = model.model.get_video_features(inputs.video_patches, inputs.video_grids).pooler_output
        embeddings = embeddings.masked_scatter((inputs.types == 2)[..., None], torch.cat(features))
    return model(inputs_embeds=embeddings, position_ids=positions, use_cache=False).logits[0]


def case_logits(model: Glm4vForConditionalGeneration, case: Case) -> list[Tensor]:
    """Reference logits of every document of a case alone, each [n, vocab] float32, without gradients."""
    with torch.no_grad():
        return [document_logits(model, inputs) for inputs in document_inputs(case, shape_of(model))]


def token_losses(logits: Tensor, document: Document) -> Tensor:
    """Cross-entropy of predicting each next token, [n - 1], unweighted."""
    return F.cross_entropy(logits[:-1].float(), torch.as_tensor(document.tokens[1:]).long(), reduction="none")


def case_gradients(model: Glm4vForConditionalGeneration, case: Case) -> tuple[float, dict[str, Tensor]]:
    """The weighted sum of a case's token losses and its gradient by Hugging Face name.

    Returns:
        The sum over documents and tokens of loss_weights[i + 1] x cross-entropy of token i + 1 (not divided by anything), and
        the gradient of every parameter; zeros where a case does not reach it, such as the vision tower in a text.
    """
    model.zero_grad(set_to_none=True)
    total = 0.0
    for document, inputs in zip(case.documents, document_inputs(case, shape_of(model)), strict=True):
        losses = token_losses(document_logits(model, inputs), document)
        loss = (losses * torch.as_tensor(document.loss_weights[1:])).sum()
        loss.backward()
        total += loss.item()
    gradients = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad for name, weight in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return total, gradients


def shape_of(model: Glm4vForConditionalGeneration) -> ModelShape:
    """The numbers of a model."""
    return ModelShape.from_hf(model.config.to_dict(), "model")
