"""The count of operations equals what torch counts while transformers' model runs, to the last operation.

Transformers' model computes every token behind the last attention; ours is counted with the trained ones alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Glm4vConfig, Glm4vForConditionalGeneration

from megatron_glmv.config.linears import adapted_layers
from megatron_glmv.config.lora import LoraConfig
from megatron_glmv.config.model import ModelConfig, Part
from megatron_glmv.plan.devices import device_peak
from megatron_glmv.plan.flops import Flops, forward_flops, row_flops, training_flops
from megatron_glmv.sequence.packed import Document, PackedSequence, mask_documents, pack
from tests.ranks import run_ranks

SHAPE = ModelConfig(preset="digits").shape
FRAMES = [(4, 6), (2, 8)]
IDS = [3, 5, 11, *[15] * 6, 12, 40, 41, 11, *[15] * 4, 12, *range(30, 47)]


@pytest.fixture(scope="module")
def model() -> Glm4vForConditionalGeneration:
    config = Glm4vConfig(**copy.deepcopy(ModelConfig(preset="digits").hf_config))
    # Eager attention is plain matrix products, which torch counts; it computes the whole square also where it is masked.
    return Glm4vForConditionalGeneration._from_config(config, attn_implementation="eager").float()


def loss_of(model: Glm4vForConditionalGeneration) -> torch.Tensor:
    ids = torch.tensor([IDS])
    return model(
        input_ids=ids,
        pixel_values=torch.zeros(sum(rows * columns for rows, columns in FRAMES), 1176),
        image_grid_thw=torch.tensor([[1, *frame] for frame in FRAMES]),
        mm_token_type_ids=(ids == SHAPE.tokens.image).long(),
        labels=ids,
    ).loss


def full_square(flops: Flops) -> float:
    """The total with the decoder's attention counted without its causal saving: n x n pairs for n (n + 1) / 2."""
    size = len(IDS)
    return flops.total + flops.text_attention * (2 * size / (size + 1) - 1)


def test_forward_equals_torch_count_in_every_part(model: Glm4vForConditionalGeneration):
    with torch.no_grad(), FlopCounterMode(display=False, depth=10) as counter:
        loss_of(model)
    counted = {name.partition(".")[2]: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
    mine = forward_flops(SHAPE, [len(IDS)], FRAMES)
    assert mine.merger == counted["model.visual.merger"] + counted["model.visual.downsample"]
    assert mine.vision == counted["model.visual"] - mine.merger
    assert mine.head == counted["lm_head"]
    size = len(IDS)
    assert mine.text_linear + mine.text_attention * 2 * size / (size + 1) == counted["model.language_model"]
    assert full_square(mine) == counter.get_total_flops()


@pytest.mark.parametrize(
    "freeze", [(), ("vision",), ("merger",), ("text",), ("vision", "merger"), ("vision", "text"), ("merger", "text")], ids=str
)
def test_training_equals_torch_count_whatever_is_frozen(model: Glm4vForConditionalGeneration, freeze: tuple[Part, ...]):
    visual = model.model.visual
    merger = {id(p) for module in (visual.downsample, visual.merger) for p in module.parameters()}
    vision = {id(p) for p in visual.parameters()} - merger
    for parameter in model.parameters():
        part = "vision" if id(parameter) in vision else "merger" if id(parameter) in merger else "text"
        parameter.requires_grad_(part not in freeze)
        parameter.grad = None
    with FlopCounterMode(display=False) as counter:
        loss_of(model).backward()
    assert full_square(training_flops(SHAPE, [len(IDS)], FRAMES, freeze)) == counter.get_total_flops()


@pytest.mark.parametrize(
    "targets",
    [
        ("*",),
        ("layers.2.*.[qkv]_proj", "gate_up_proj"),
        ("blocks.1.*.up_proj", "layers.1.*.o_proj"),
        ("merger.proj",),
        ("lm_head",),
    ],
    ids=str,
)
def test_training_adapters_equals_torch_count(targets: tuple[str, ...]):
    """The frozen layers count what passes through them, those before the first adapter their forward pass alone."""
    lora = LoraConfig(rank=3, targets=targets)
    config = Glm4vConfig(**copy.deepcopy(ModelConfig(preset="digits").hf_config))
    model = Glm4vForConditionalGeneration._from_config(config, attn_implementation="eager").float()
    names = list(adapted_layers(lora, SHAPE))
    get_peft_model(model, PeftConfig(r=lora.rank, target_modules=names, task_type="CAUSAL_LM"))
    with FlopCounterMode(display=False) as counter:
        loss_of(model).backward()
    assert full_square(training_flops(SHAPE, [len(IDS)], FRAMES, lora=lora)) == counter.get_total_flops()


ROW, TRAINED = 64, 32
LEARNING: dict[str, dict[str, Any]] = {
    "everything": {},
    "all but text": {"freeze": ["text"]},
    "text alone": {"freeze": ["vision", "merger"]},
    "adapters": {"lora": {"rank": 3, "targets": ["attn.qkv", "o_proj", "gate_up_proj", "down_proj", "lm_head"]}},
    "adapters of the head": {"lora": {"rank": 3, "targets": ["lm_head"]}},
    "adapters of the last MLP": {"lora": {"rank": 3, "targets": ["layers.3.mlp.down_proj"]}},
}
"""None with adapters of several layers that are one product here: it computes more than they need."""


def row_without_padding(trained: int) -> PackedSequence:
    """A row of pictures and text of which the last tokens are trained."""
    tokens = np.array([*IDS, *range(40, 40 + ROW - len(IDS))])
    document = Document(tokens, np.arange(ROW) >= ROW - trained, tuple(FRAMES))
    patches = torch.zeros(sum(rows * columns for rows, columns in FRAMES), SHAPE.vision.patch_dim, dtype=torch.uint8)
    return pack([document], ROW, image_token=SHAPE.tokens.image, pad_token=SHAPE.tokens.pad, patches=patches)


def count_real_model(rank: int, trees: Sequence[dict[str, Any]]) -> list[list[tuple[float, dict[str, float]]]]:
    """Operations for each configuration, with all tokens behind the last attention and with the trained ones alone.

    Each time of forward and backward pass together, and of every module in the forward pass.
    """
    from megatron.core import parallel_state

    from megatron_glmv.config.training import TrainConfig
    from megatron_glmv.parallel import groups
    from megatron_glmv.training.assemble import assemble, assemble_model
    from megatron_glmv.training.step import chunk_inputs

    found = []
    for config in map(TrainConfig.model_validate, trees):
        groups.initialize(config.parallel, seed=1)
        [chunk] = assemble(config, assemble_model(config)).chunks
        chunk.zero_grad_buffer()
        counts = []
        for all_tokens in (True, False):
            inputs = chunk_inputs(config, row_without_padding(TRAINED), chunk.module, all_tokens=all_tokens)
            assert inputs.labels.size(1) == (ROW if all_tokens else TRAINED)
            with FlopCounterMode(display=False, depth=10) as whole:
                (chunk(inputs) * inputs.loss_weights).sum().backward()
            with torch.no_grad(), FlopCounterMode(display=False, depth=10) as forward:
                chunk(inputs)
            counts.append((whole.get_total_flops(), {name: sum(n.values()) for name, n in forward.get_flop_counts().items()}))
        found.append(counts)
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[float, dict[str, float]]]]:
    base: dict[str, Any] = {
        "run_folder": tmp_path_factory.mktemp("run"), "steps": 1, "global_batch_rows": 1,
        "precision": {"dtype": "fp32", "layers": "torch"},
        "data": {"sequence_length": ROW, "sources": [{"name": "none", "path": "unused"}]},
    }  # fmt: skip
    trees = [base | {"model": {"preset": "digits", **model}} for model in LEARNING.values()]
    return dict(zip(LEARNING, run_ranks(count_real_model, 1, trees)[0], strict=True))


TABLE = 2 * sum(rows * columns for rows, columns in FRAMES) * SHAPE.vision.position_grid**2 * SHAPE.vision.hidden_size
"""Of reading the position table, which is a product here; plan/flops.py leaves it out."""


def products(flops: Flops) -> float:
    """The total without attention, which torch does not count on a CPU where it is one fused operation."""
    return flops.total - flops.vision_attention - flops.text_attention


@pytest.mark.parametrize("learns", LEARNING)
def test_training_equals_torch_count_of_the_real_model(real: dict[str, Any], learns: str):
    model = ModelConfig.model_validate({"preset": "digits", **LEARNING[learns]})
    for trained, (counted, _) in zip((None, TRAINED), real[learns], strict=True):
        mine = products(training_flops(SHAPE, [ROW], FRAMES, model.freeze, model.lora, trained))
        assert mine + TABLE * (1 + (model.lora is None and "vision" not in model.freeze)) == counted


def test_forward_equals_torch_count_of_the_real_decoder(real: dict[str, Any]):
    """The head and one MLP see the trained tokens; the rest of the decoder sees all."""
    for trained, (_, counted) in zip((None, TRAINED), real["everything"], strict=True):
        mine = forward_flops(SHAPE, [ROW], FRAMES, trained)
        assert mine.head == counted["DistributedDataParallel.module.language_model.output_layer"]
        assert mine.text_linear == counted["DistributedDataParallel.module.language_model.decoder"]
        assert products(mine) + TABLE == counted["Global"]


def test_documents_and_frames_attend_only_to_themselves():
    both = training_flops(SHAPE, [100, 60], [(4, 6), (8, 8)])
    assert both == training_flops(SHAPE, [100], [(4, 6)]) + training_flops(SHAPE, [60], [(8, 8)])
    merged = training_flops(SHAPE, [160], [(4, 22)])
    assert merged.text_attention > both.text_attention
    assert merged.vision_attention > both.vision_attention
    assert (merged.text_linear, merged.vision_linear) == (both.text_linear, both.vision_linear)


def test_a_text_row_of_the_9b_costs_six_operations_a_weight_and_token():
    shape = ModelConfig(preset="glm-4.1v-9b").shape
    flops = training_flops(shape, [8192], [])
    # decoder without embedding, biases and norms, with the head
    weights = 8_779_522_048 - 151_552 * 4096 - 40 * (4608 + 4 * 4096) - 4096 + 620_756_992
    assert flops.text_linear + flops.head == 6 * 8192 * weights
    assert flops.vision == flops.merger == 0


def test_padding_of_a_row_costs_nothing():
    documents = [Document(np.array(IDS), np.ones(len(IDS)), tuple(FRAMES)), Document(np.arange(20, 40), np.ones(20))]
    row = pack(documents, 512, image_token=SHAPE.tokens.image, pad_token=SHAPE.tokens.pad, align=8)
    assert row_flops(SHAPE, row) == training_flops(SHAPE, [len(IDS), 20], FRAMES, trained=len(IDS) - 1 + 19)


def test_a_row_counts_the_tokens_whose_loss_has_a_weight():
    row = row_without_padding(TRAINED)
    assert row_flops(SHAPE, row) == training_flops(SHAPE, [ROW], FRAMES, trained=TRAINED)
    assert row_flops(SHAPE, mask_documents(row, [0])) == training_flops(SHAPE, [ROW], FRAMES, trained=0)
    lora = LoraConfig(rank=3, targets=("*",))
    assert row_flops(SHAPE, row, lora=lora) == training_flops(SHAPE, [ROW], FRAMES, lora=lora, trained=TRAINED)


def test_peaks_are_known_by_the_whole_product_name():
    assert device_peak("NVIDIA H100 80GB HBM3", "bf16") == device_peak("NVIDIA H200", "bf16") == 989.4e12
    assert device_peak("NVIDIA H100 80GB HBM3", "fp8") == 2 * 989.45e12
    assert device_peak("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert device_peak("NVIDIA A100-SXM4-80GB", "fp8") is None
    for slower in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL"):
        assert device_peak(slower, "bf16") is None, "a slower card of the same family"
    assert device_peak("cpu", "fp32") is None
