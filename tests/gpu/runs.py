"""What ranks do in the tests on a GPU: build, train, compare. Everything runs on the CPU too, with the torch spec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megatron_glmv.config.training import TrainConfig
from megatron_glmv.convert.hf_import import from_state_dict
from megatron_glmv.convert.parameters import local_parameters
from megatron_glmv.data.loader import StepRows
from megatron_glmv.model.glm4v import Glm4vModel
from megatron_glmv.parallel import groups, platform
from megatron_glmv.sequence.packed import Document, PackedSequence, pack
from megatron_glmv.training.assemble import Assembly, assemble, assemble_model
from megatron_glmv.training.step import chunk_inputs, reduce_loss, run_schedule, train_step
from tests.model import oracle
from tests.model.layouts import LENGTH, make_rows

SHAPE = oracle.model_shape("digits")
LANGUAGE_TOKENS = 128
"""Of the synthetic language, from token 30 on."""


def config(folder: str, *, length: int = LENGTH, rows: int = 4, lr: float = 1e-3, **precision: Any) -> TrainConfig:
    """A run of the digits' architecture on one rank; by default in bf16 on a GPU, and in fp32 elsewhere."""
    return TrainConfig.model_validate({
        "run_folder": folder,
        "steps": 200,
        "global_batch_rows": rows,
        "model": {"preset": "digits"},
        "precision": {"dtype": "bf16" if on_gpu() else "fp32", **precision},
        "optimizer": {"lr": lr, "min_lr": lr, "schedule": "constant"},
        "data": {"sequence_length": length, "sources": [{"name": "a", "path": "unused"}]},
    })  # fmt: skip


def build(settings: TrainConfig) -> Assembly:
    """The run's model under Megatron's DDP and its optimizer, with the oracle's weights."""
    groups.initialize(settings.parallel, settings.seed)
    models = assemble_model(settings)
    from_state_dict(models, oracle.random_model("digits").state_dict(), SHAPE)
    assembly = assemble(settings, models)
    assembly.optimizer.reload_model_params()
    return assembly


def in_turn(work: Callable[[Assembly], Any], variants: dict[str, TrainConfig]) -> dict[str, Any]:
    """`work` on a fresh assembly of each variant."""
    found = {}
    for name, settings in variants.items():
        found[name] = work(build(settings))
        groups.parallel_state.destroy_model_parallel()
    return found


def language_rows(step: int, rows: int, length: int) -> list[PackedSequence]:
    """Rows of a random first-order language with pictures of noise: a loss that falls from log 384 to a floor far from 0.

    Each token has 8 likely successors, so the floor is a bit above log 8 = 2.08, and 1 % of it is not noise.
    """
    successors = np.random.default_rng(0).integers(0, LANGUAGE_TOKENS, (LANGUAGE_TOKENS, 8))
    random = np.random.default_rng(1000 + step)
    return [_language_row(random, successors, length) for _ in range(rows)]


def _language_row(random: np.random.Generator, successors: np.ndarray, length: int) -> PackedSequence:
    ids, frame = SHAPE.tokens, (4, int(random.integers(1, 5)) * 2)
    documents, patches, room = [], [], length
    while room >= 64:
        words = [int(random.integers(LANGUAGE_TOKENS))]
        for _ in range(int(random.integers(40, 100))):
            words.append(int(successors[words[-1], random.integers(8)]))
        visual = [ids.image_start, *[ids.image] * (frame[0] * frame[1] // 4), ids.image_end]
        tokens = np.array([*visual, *(30 + np.array(words))])[:room]
        weights = np.concatenate((np.zeros(len(visual)), np.ones(len(tokens) - len(visual)))).astype(np.float32)
        documents.append(Document(tokens, weights, (frame,), "x"))
        patches.append(random.integers(0, 256, (frame[0] * frame[1], SHAPE.vision.patch_dim), dtype=np.uint8))
        room -= len(tokens)
    return pack(documents, length, image_token=ids.image, pad_token=ids.pad, patches=torch.from_numpy(np.concatenate(patches)))


def train_language(assembly: Assembly, steps: int) -> list[float]:
    """Losses of a training on fresh rows of the language."""
    settings = assembly.config
    assert isinstance(settings, TrainConfig)
    losses = []
    for step in range(steps):
        rows = language_rows(step, settings.global_batch_rows, settings.sequence_length)
        losses.append(train_step(assembly, StepRows(tuple(rows), ()), step).loss)
    return losses


def loss_and_gradients(assembly: Assembly) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss of the layout tests' rows, and each parameter's accumulated gradient in fp32."""
    outputs = run_schedule(assembly, make_rows(SHAPE), forward_only=False)
    loss, _ = reduce_loss(outputs)
    own: dict[str, Any] = dict(local_parameters(assembly.models))
    return loss, {name: parameter.main_grad.float().cpu() for name, parameter in own.items()}


def logits(assembly: Assembly, row: PackedSequence) -> torch.Tensor:
    """[S, V] float32 of one row."""
    [model] = assembly.models
    with torch.no_grad():
        return model(chunk_inputs(assembly.config, row, model, all_tokens=True), return_logits=True)[:, 0].float().cpu()


def features(settings: TrainConfig, model: Glm4vModel, row: PackedSequence) -> torch.Tensor:
    """[v, hidden] float32 of the row's pictures, padding included."""
    inputs = chunk_inputs(settings, row, model)
    assert inputs.vision is not None
    with torch.no_grad():
        return model._features(inputs.vision)[:, 0].float().cpu()


def distance(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative, in norm."""
    return float((found - reference).norm() / reference.norm().clamp(min=1e-30))


def windows(losses: Sequence[float], size: int = 20) -> np.ndarray:
    """Means of `size` losses each."""
    return np.asarray(losses).reshape(-1, size).mean(1)


def with_patches(row: PackedSequence, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedSequence:
    """The row with its patches changed."""
    assert row.patches is not None
    return replace(row, patches=change(row.patches))


def on_gpu() -> bool:
    """Whether the ranks of these tests compute on a GPU."""
    return platform.has_cuda()
