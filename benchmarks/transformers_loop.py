"""A plain transformers training loop on the packed rows' samples, which runs steps when it is asked.

The samples of a step are one batch, padded on the right to the longest of them, with labels where the rows have loss weights.
Every frame of a video is given as a picture: GLM-4.1V computes the same for both, and transformers refuses a batch in which
some samples have pictures and others videos. Pixels are decoded and normalised before any clock runs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digits_model import run_config
from safetensors.torch import load_file
from sides import answer
from torch import Tensor
from transformers import Glm4vConfig, Glm4vForConditionalGeneration

from megatron_glmv.config.training import TrainConfig
from megatron_glmv.data.loader import RowStream
from megatron_glmv.sequence.packed import PackedSequence
from megatron_glmv.sequence.patches import join_frames, normalize_patches

IGNORED = -100


def read_batches(config: TrainConfig, num_steps: int) -> list[tuple[dict[str, Tensor], int]]:
    """The batches of the first steps, and how many useful tokens each has."""
    stream = RowStream(
        config.data.sources, config.data, config.model.shape, seed=config.seed, global_batch_rows=config.global_batch_rows,
        data_rank=0, data_size=1, decode=True, align=1,
    )  # fmt: skip
    ids = config.model.shape.tokens
    try:
        return [_batch(stream.step(step).rows, ids.image, ids.pad) for step in range(num_steps)]
    finally:
        stream.close()


def _batch(rows: tuple[PackedSequence, ...], image: int, pad: int) -> tuple[dict[str, Tensor], int]:
    spans = [(row, start, end) for row in rows for _, start, end in row.documents]
    longest = max(end - start for _, start, end in spans)
    tokens = torch.full((len(spans), longest), pad)
    labels = torch.full_like(tokens, IGNORED)
    mask = torch.zeros_like(tokens)
    for line, (row, start, end) in enumerate(spans):
        tokens[line, : end - start] = row.tokens[start:end]
        mask[line, : end - start] = 1
        trained = row.loss_weights[start : end - 1] > 0
        labels[line, 1 : end - start] = row.labels[start : end - 1].where(trained, IGNORED)
    frames = torch.cat([row.frames for row in rows])
    batch = {
        "input_ids": tokens, "attention_mask": mask, "labels": labels, "mm_token_type_ids": (tokens == image).long(),
        "pixel_values": torch.cat([_pixels(row) for row in rows]),
        "image_grid_thw": torch.cat((torch.ones(len(frames), 1, dtype=torch.int64), frames), dim=1),
    }  # fmt: skip
    return batch, sum(row.num_useful for row in rows)


def _pixels(row: PackedSequence) -> Tensor:
    assert row.patches is not None and row.moving is not None
    return normalize_patches(join_frames(row.patches, row.frames, row.moving), torch.float32)


def replace_convolutions(model: Glm4vForConditionalGeneration) -> None:
    """Compute the two convolutions of the vision tower, whose strides are their kernels, as the matrix products they are."""
    visual = model.model.visual
    embed, downsample = visual.patch_embed, visual.downsample
    embed.forward = lambda x: F.linear(x, embed.proj.weight.flatten(1), embed.proj.bias)
    downsample.forward = lambda x: F.linear(x.flatten(1), downsample.weight.flatten(1), downsample.bias)


class Loop:
    """The model, torch's own AdamW, and the batches."""

    def __init__(self, config: TrainConfig, num_steps: int, *, matmuls: bool) -> None:
        """Read all batches and build the model."""
        self.batches = read_batches(config, num_steps)
        assert config.model.hf_folder is not None
        tree = json.loads((config.model.hf_folder / "config.json").read_text(encoding="utf-8"))
        self.model = Glm4vForConditionalGeneration(Glm4vConfig(**tree)).float().train()
        if matmuls:
            replace_convolutions(self.model)
        own = config.optimizer
        matrices = [weight for weight in self.model.parameters() if weight.dim() > 1]
        vectors = [weight for weight in self.model.parameters() if weight.dim() == 1]
        groups = [{"params": matrices, "weight_decay": own.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=own.lr, betas=(own.beta1, own.beta2), eps=own.epsilon)
        self.clip, self.done = own.clip_grad_norm, 0

    def load(self, path: str) -> None:
        """Start from these weights."""
        self.model.load_state_dict(load_file(path))

    def steps(self, count: int) -> dict[str, Any]:
        """Run and time some steps."""
        seconds, tokens, losses = [], [], []
        for batch, useful in self.batches[self.done : self.done + count]:
            started = time.perf_counter()
            loss = self.model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - started)
            tokens.append(useful)
        self.done += count
        padded = self.batches[self.done - 1][0]["input_ids"].numel()
        return {"seconds": seconds, "tokens": tokens, "losses": losses, "padded": padded}


def main() -> None:
    """Build the loop and answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size")
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--batch", type=int, required=True, help="packed rows whose samples are one step")
    parser.add_argument("--steps", type=int, required=True, help="steps that will be asked for")
    parser.add_argument("--matmuls", action="store_true", help="replace the convolutions")
    arguments = parser.parse_args()
    config = run_config(arguments.size, arguments.folder, arguments.rows, arguments.batch)
    loop = Loop(config, arguments.steps, matmuls=arguments.matmuls)
    answer({"steps": loop.steps, "load": loop.load})


if __name__ == "__main__":
    main()
