"""A client of the exported folder answers what the Megatron model answers: greedy tokens about a picture."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_glmv.convert.command import run_export, run_import
from tests.convert.hf_folders import write_hf_folder
from tests.ranks import run_ranks

NEW_TOKENS = 12


def _answer(rank: int, checkpoint: Path, prompt: list[int], patches: torch.Tensor, frame: tuple[int, int]) -> list[int]:
    """Greedy tokens of the Megatron model, the whole row computed anew for each."""
    from megatron_glmv.config.parallel import ParallelConfig, PrecisionConfig, RecomputeConfig
    from megatron_glmv.convert.checkpoint_tensors import CheckpointTensors
    from megatron_glmv.convert.parameters import local_parameters
    from megatron_glmv.model.glm4v import build_model
    from megatron_glmv.model.inputs import make_inputs
    from megatron_glmv.parallel import groups
    from megatron_glmv.run_folder.checkpoint_folder import read_manifest, shape_of
    from megatron_glmv.sequence.packed import Document, pack

    layout = ParallelConfig(distributed_optimizer=False)
    groups.initialize(layout, seed=1)
    shape = shape_of(checkpoint, read_manifest(checkpoint))
    stored = CheckpointTensors(checkpoint, shape)
    models = build_model(shape, layout, PrecisionConfig(dtype="fp32", layers="torch"), RecomputeConfig())
    tokens = list(prompt)
    with torch.no_grad():
        for name, parameter in local_parameters(models).items():
            parameter.copy_(stored.read(name))
        for _ in range(NEW_TOKENS):
            document = Document(np.array(tokens), np.ones(len(tokens), dtype=np.float32), (frame,), "prompt")
            row = pack(
                [document],
                len(tokens),
                image_token=shape.tokens.image,
                pad_token=shape.tokens.pad,
                patches=patches,
                key="prompt",
            )
            logits = models[0](make_inputs(row, shape, torch.device("cpu")), return_logits=True)
            tokens.append(int(logits[-1, 0].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made before torchvision is seen: transformers is another one afterwards."""
    folder = tmp_path_factory.mktemp("client")
    write_hf_folder(folder / "hf", torch.float32)
    assert run_import(folder / "hf", folder / "checkpoint") == 0
    assert run_export(folder / "checkpoint", folder / "exported") == 0
    return folder


def test_greedy_answer_about_a_picture(folder: Path, torchvision_shim: ModuleType) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    pixels = np.random.default_rng(3).integers(0, 256, (84, 140, 3), dtype=np.uint8)
    item = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": "Read the digits."}]
    processor = AutoProcessor.from_pretrained(folder / "exported")
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": item}], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    client = AutoModelForImageTextToText.from_pretrained(folder / "exported", dtype="auto")
    client.generation_config.eos_token_id = None  # random weights: go on whatever comes
    answer = client.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()

    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    prompt = inputs["input_ids"][0].tolist()
    [found] = run_ranks(_answer, 1, folder / "checkpoint", prompt, inputs["pixel_values"], (rows, columns))
    assert found == answer
    assert len(set(answer)) > 3, "an answer that repeats one token proves little"
