"""Compares a Hugging Face folder with a checkpoint: every tensor to the bit, and what both compute on the probe rows.

Equal tensors alone prove little, for both directions read one table: gate and up swapped in it would come back unswapped. So
transformers runs on the folder and this project's model on the checkpoint, each reading its own names, in float32.

Source: transformers 5.23.0, models/glm4v/modeling_glm4v.py (`forward` refuses images and videos in one call: embeddings and
positions are given to it, and each document stands alone in a padded batch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.parallel import ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_glmv.config.weight_map import RankPart, check_names, entries, rank_segments
from megatron_glmv.convert.checkpoint_tensors import Stored
from megatron_glmv.convert.hf_folder import HfWeights
from megatron_glmv.convert.probe import DOCUMENTS, Probe, make_probe
from megatron_glmv.convert.streaming import RowEmbedding, RowHead, streamed, without_memory
from megatron_glmv.model.glm4v import build_model
from megatron_glmv.model.inputs import make_inputs
from megatron_glmv.parallel import groups

CHUNK_BYTES = 64_000_000
"""Rows of a tensor that are compared at once."""
_ONE_RANK = ParallelConfig(distributed_optimizer=False)


def different_tensors(
    weights: HfWeights, stored: Stored, shape: ModelShape, progress: Callable[[int], object]
) -> Iterator[tuple[str, str]]:
    """Compare every tensor to the bit.

    Args:
        weights: the Hugging Face side.
        stored: the Megatron side.
        shape: the architecture of both.
        progress: is told the number of bytes of each piece.

    Yields:
        (Hugging Face name, what is different) of each tensor that is.
    """
    for found in entries(shape).values():
        kinds = {name: (weights.dtypes[name], stored.dtype(found.name)) for name in found.hf_names}
        if unlike := {name: kind for name, kind in kinds.items() if kind[0] != kind[1]}:
            yield from (
                (name, f"{ours} in the folder and {theirs} in the checkpoint") for name, (ours, theirs) in unlike.items()
            )
            continue
        counts = dict.fromkeys(found.hf_names, 0)
        rows = max(1, CHUNK_BYTES // (torch.Size(found.shape[1:]).numel() * stored.dtype(found.name).itemsize))
        for start in range(0, found.shape[0], rows):
            stop = min(start + rows, found.shape[0])
            theirs = stored.read(found.name, (start, stop))
            row = 0
            for s in rank_segments(found, RankPart(((start, stop),))):
                ours = weights.read(found.hf_names[s.source], s.start, s.stop, None)
                part = theirs[row : row + s.stop - s.start].reshape(ours.shape)
                counts[found.hf_names[s.source]] += _different_values(ours, part)
                row += s.stop - s.start
            progress(theirs.nbytes)
        sizes = dict(zip(found.hf_names, found.hf_shapes, strict=True))
        for name, count in counts.items():
            if count:
                yield name, f"{count} of {torch.Size(sizes[name]).numel()} values are different"


def _different_values(ours: Tensor, theirs: Tensor) -> int:
    """How many values are not the same bits."""
    bits = torch.int16 if ours.dtype.itemsize == 2 else torch.int32
    ours, theirs = ours.contiguous().view(bits), theirs.contiguous().view(bits)
    return 0 if torch.equal(ours, theirs) else int((ours != theirs).sum())


@dataclass(frozen=True)
class Run:
    """What one side computed. S = tokens of all documents, end to end.

    Attributes:
        logits: [S, vocabulary] float32.
        stages: after each part of the model, in order: its name in plain words and its output, [rows, channels].
    """

    logits: Tensor
    stages: list[tuple[str, Tensor]]


@torch.no_grad()
def run_transformers(folder: Path, weights: HfWeights, shape: ModelShape, done: Callable[[str], object]) -> Run:
    """Run transformers' model of a folder on the probe.

    Args:
        folder: with config.json; no code in it is run.
        weights: its tensors.
        shape: the architecture.
        done: is told each part that has run.

    Raises:
        MappingError: transformers' model has other parameters than the folder.
    """
    # It takes seconds to import, which a conversion without proof need not wait for.
    from transformers import AutoConfig, AutoModelForImageTextToText

    probe = make_probe(shape)
    with without_memory():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    check_names(weights.shapes, dict(model.named_parameters()), f"{folder}, read by transformers")
    visual, text = "model.visual", "model.language_model"
    plain = _plain_names(shape, f"{visual}.blocks", f"{visual}.merger", f"{text}.layers")
    rows = weights.shapes["lm_head.weight"][0]
    table = f"{text}.embed_tokens.weight"
    model.set_input_embeddings(RowEmbedding(lambda a, b: weights.read(table, a, b, None), rows))
    model.lm_head = RowHead(lambda a, b: weights.read("lm_head.weight", a, b, None), rows, with_bias=False)
    stages = _record(model, plain)
    with streamed(model, list(plain), lambda name: _whole(weights, name), done):
        logits = _transformers_logits(model, probe)
    is_text = {name for name in stages if name.startswith("decoder")}
    kept = probe.mask.bool()
    outputs = [
        (name, torch.cat([part[kept] for part in parts] if name in is_text else parts)) for name, parts in stages.items()
    ]
    return Run(logits[kept], outputs)


def _transformers_logits(model: Any, probe: Probe) -> Tensor:
    """[B, L, vocabulary]: every document of the probe alone, padded on the right."""
    positions = torch.zeros(3, *probe.input_ids.shape, dtype=torch.int64)
    for number, length in enumerate(probe.lengths):
        grids = [torch.tensor(found[number]) if found[number] else None for found in (probe.image_grids, probe.video_grids)]
        ids, types = probe.input_ids[number : number + 1, :length], probe.types[number : number + 1, :length]
        alone, _ = model.model.get_rope_index(ids, types, image_grid_thw=grids[0], video_grid_thw=grids[1])
        positions[:, number, :length] = alone[:, 0]
    embeddings = model.get_input_embeddings()(probe.input_ids)
    for kind, call, patches, found in (
        (1, model.model.get_image_features, probe.image_patches, probe.image_grids),
        (2, model.model.get_video_features, probe.video_patches, probe.video_grids),
    ):
        features = torch.cat(call(patches, torch.tensor([grid for grids in found for grid in grids])).pooler_output)
        embeddings = embeddings.masked_scatter((probe.types == kind)[..., None], features)
    return model(inputs_embeds=embeddings, position_ids=positions, attention_mask=probe.mask, use_cache=False).logits


@torch.no_grad()
def run_megatron(stored: Stored, shape: ModelShape, done: Callable[[str], object]) -> Run:
    """Run this project's model with a checkpoint's weights on the probe, packed in one row, on one rank.

    Args:
        stored: the checkpoint's tensors.
        shape: its architecture.
        done: is told each part that has run.
    """
    groups.initialize(_ONE_RANK, seed=0)
    try:
        with without_memory():
            [model] = build_model(shape, _ONE_RANK, PrecisionConfig(dtype="fp32", layers="torch"), RecomputeConfig())
        visual, text = "vision_model", "language_model"
        plain = _plain_names(shape, f"{visual}.decoder.layers", "vision_projection", f"{text}.decoder.layers")
        table, head, rows = f"{text}.embedding.word_embeddings.weight", f"{text}.output_layer.weight", shape.text.vocab_size
        model.language_model.embedding.word_embeddings = RowEmbedding(lambda a, b: stored.read(table, (a, b)), rows)
        model.language_model.output_layer = RowHead(lambda a, b: stored.read(head, (a, b)), rows, with_bias=True)
        stages = _record(model, plain)
        inputs = make_inputs(make_probe(shape).row, shape, torch.device("cpu"))
        with streamed(model.eval(), list(plain), stored.read, done):
            logits = model(inputs, return_logits=True)[:, 0]
    finally:
        groups.destroy()
    return Run(logits, [(name, torch.cat(parts)) for name, parts in stages.items()])


def _plain_names(shape: ModelShape, blocks: str, merger: str, layers: str) -> dict[str, str]:
    """The parts of the model that are filled one at a time, and what to call them."""
    return (
        {f"{blocks}.{n}": f"vision layer {n}" for n in range(shape.vision.num_layers)}
        | {merger: "merger"}
        | {f"{layers}.{n}": f"decoder layer {n}" for n in range(shape.text.num_layers)}
    )


def _record(model: nn.Module, plain: dict[str, str]) -> dict[str, list[Tensor]]:
    """Keep what each part puts out; a part that runs twice puts out twice."""
    found: dict[str, list[Tensor]] = {name: [] for name in plain.values()}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            is_padded = output.dim() == 3 and output.shape[1] > 1 and output.shape[0] == len(DOCUMENTS)
            found[name].append(output if is_padded else output.reshape(-1, output.shape[-1]))

        return hook

    for unit, name in plain.items():
        model.get_submodule(unit).register_forward_hook(keep(name))
    return found


def _whole(weights: HfWeights, name: str) -> Tensor:
    return weights.read(name, 0, weights.shapes[name][0], None)
