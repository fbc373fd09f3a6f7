"""Hugging Face weights into live models of several layouts and back, bit-equal, and the logits of what was imported.

One spawn of four ranks (tensor 2 x pipeline 2 x virtual pipeline 2 of a four-layer decoder) and one of one rank serve all.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from megatron_glmv.config.parallel import ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_glmv.config.weight_map import MappingError
from tests.model import oracle
from tests.ranks import leave_layout, run_ranks

SHAPE = oracle.model_shape("digits")
FP32 = PrecisionConfig(dtype="fp32", layers="torch")


def _build(parallel):
    from megatron_glmv.model.glm4v import build_model
    from megatron_glmv.parallel import groups

    leave_layout()
    groups.initialize(parallel, seed=1)
    return build_model(SHAPE, parallel, FP32, RecomputeConfig())


def _message(function, *args):
    try:
        function(*args)
    except MappingError as error:
        return str(error)
    return ""


def _difference(weights, chunks, read=None):
    """Names whose export is not bit-equal to `weights`, on global rank 0; every rank takes part."""
    from megatron_glmv.convert.hf_export import gather_hf_tensors

    exported = dict(gather_hf_tensors(chunks, SHAPE, *([read] if read else [])))
    if torch.distributed.get_rank():
        assert not exported
        return None
    return sorted(
        {name for name, tensor in exported.items() if not torch.equal(tensor, weights[name])} | exported.keys() ^ weights.keys()
    )


def _import_and_export_on_four_ranks(rank, folder):
    from megatron_glmv.convert.hf_import import from_state_dict, load_hf_weights
    from megatron_glmv.convert.parameters import local_parameters

    chunks = _build(ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2))
    weights = dict(oracle.random_model("digits", seed=3).state_dict())
    from_state_dict(chunks, weights, SHAPE)
    found = {"from_state_dict": _difference(weights, chunks)}
    with torch.no_grad():
        for parameter in local_parameters(chunks).values():
            parameter.zero_()
    found["zeroed"] = _difference(weights, chunks)
    load_hf_weights(chunks, folder, SHAPE)
    found["from_folder"] = _difference(weights, chunks)
    found["halved"] = _difference({name: tensor / 2 for name, tensor in weights.items()}, chunks, lambda p: p / 2)
    found["layers"] = sorted(name for name in local_parameters(chunks) if name.endswith("post_mlp_layernorm.weight"))
    dealt = _build(ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2, vision="images"))
    from_state_dict(dealt, weights, SHAPE)
    found["images_dealt"] = _difference(weights, dealt)
    uneven = _build(ParallelConfig(tensor=2, pipeline=2, first_stage_layers=0))
    load_hf_weights(uneven, folder, SHAPE)
    found["uneven"] = _difference(weights, uneven)
    return found


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    save_file(oracle.random_model("digits", seed=3).state_dict(), folder / "model.safetensors")
    return run_ranks(_import_and_export_on_four_ranks, 4, folder, timeout_s=300)


def test_round_trip_is_bit_equal_in_a_layout_of_four_ranks(four_ranks):
    assert four_ranks[0]["from_state_dict"] == []
    assert four_ranks[0]["from_folder"] == []
    assert four_ranks[0]["uneven"] == []
    assert four_ranks[0]["images_dealt"] == []
    assert [ranks["from_folder"] for ranks in four_ranks[1:]] == [None] * 3


def test_export_reads_the_live_weights(four_ranks):
    assert len(four_ranks[0]["zeroed"]) == len(oracle.random_model("digits").state_dict())


def test_export_reads_what_it_is_told(four_ranks):
    assert four_ranks[0]["halved"] == []


def test_layers_have_their_numbers_in_the_whole_model(four_ranks):
    """The interleaved schedule gives stage 0 the layers 0 and 2; the vision tower's layers have no such norm."""
    for rank, layers in enumerate([(0, 2), (0, 2), (1, 3), (1, 3)]):
        assert four_ranks[rank]["layers"] == [f"language_model.decoder.layers.{n}.post_mlp_layernorm.weight" for n in layers]


def _logits(chunks, case):
    from megatron_glmv.model.inputs import make_inputs
    from megatron_glmv.sequence.packed import pack

    length = sum(len(document.tokens) for document in case.documents)
    row = pack(case.documents, length, image_token=SHAPE.tokens.image, pad_token=SHAPE.tokens.pad, patches=case.patches)
    with torch.no_grad():
        return chunks[0](make_inputs(row, SHAPE, torch.device("cpu")), return_logits=True)[:, 0]


def _gap(chunks, case, expected):
    return (_logits(chunks, case) - expected).abs().max().item()


def _check_one_rank(rank, folder):
    from megatron_glmv.convert.hf_import import from_state_dict, load_hf_weights

    chunks = _build(ParallelConfig())
    model = oracle.random_model("digits", seed=3)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    case = oracle.all_cases(SHAPE)["several_images"]
    expected = torch.cat(oracle.case_logits(model, case))
    found = {}
    for name, broken in {"right": weights, **broken_weights(weights)}.items():
        from_state_dict(chunks, broken, SHAPE)
        found[name] = _gap(chunks, case, expected)
    load_hf_weights(chunks, folder, SHAPE)
    found["folder"] = _gap(chunks, case, expected)
    bias = "model.language_model.layers.1.self_attn.k_proj.bias"
    norm = "model.visual.post_layernorm.weight"
    found["no_bias"] = _message(from_state_dict, chunks, {n: t for n, t in weights.items() if n != bias}, SHAPE)
    found["extra"] = _message(from_state_dict, chunks, {**weights, "model.visual.extra": weights[norm]}, SHAPE)
    found["wrong_shape"] = _message(from_state_dict, chunks, {**weights, norm: weights[norm][:-1]}, SHAPE)
    chunks[0].language_model.output_layer.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    found["extra_parameter"] = _message(from_state_dict, chunks, weights, SHAPE)
    return found


def broken_weights(weights):
    """Conversions that are almost right: each must show in the logits."""
    layer = "model.language_model.layers.1."
    gate_up = layer + "mlp.gate_up_proj.weight"
    query, query_bias = layer + "self_attn.q_proj.weight", layer + "self_attn.q_proj.bias"
    gate, up = ("model.visual.blocks.1.mlp." + part for part in ("gate_proj.weight", "up_proj.weight"))
    heads, width = SHAPE.text.num_heads, SHAPE.text.head_dim
    vision = "model.visual.blocks.1.attn.qkv.weight"
    vision_heads, vision_width = SHAPE.vision.num_heads, SHAPE.vision.head_dim

    def transposed(tensor, *sizes):
        return tensor.view(*sizes, -1).transpose(0, 1).reshape(tensor.shape)

    return {
        "text_gate_up_swapped": {**weights, gate_up: torch.cat(weights[gate_up].chunk(2)[::-1])},
        "vision_gate_up_swapped": {**weights, gate: weights[up], up: weights[gate]},
        "query_heads_transposed": {**weights, query: transposed(weights[query], heads, width)},
        "query_bias_transposed": {**weights, query_bias: transposed(weights[query_bias], heads, width)},
        "vision_heads_transposed": {**weights, vision: transposed(weights[vision], 3 * vision_heads, vision_width)},
        "bias_zero": {**weights, query_bias: torch.zeros_like(weights[query_bias])},
    }


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    save_file(oracle.random_model("digits", seed=3).state_dict(), folder / "model.safetensors")
    return run_ranks(_check_one_rank, 1, folder)[0]


def test_imported_model_computes_what_transformers_computes(one_rank):
    """3e-4 at a logit standard deviation of 1.4 is this project's parity gate; measured 5.1e-5."""
    assert one_rank["right"] < 3e-4
    assert one_rank["folder"] < 3e-4


@pytest.mark.parametrize("name", broken_weights(dict(oracle.random_model("digits", seed=3).state_dict())))
def test_almost_right_weights_show_in_the_logits(one_rank, name):
    assert one_rank[name] > 1e-2


def test_missing_and_unknown_tensors_are_named(one_rank):
    assert one_rank["no_bias"] == "the state dict: missing model.language_model.layers.1.self_attn.k_proj.bias"
    assert one_rank["extra"] == "the state dict: no rule of config/weight_map.py covers model.visual.extra"
    assert "model.visual.post_layernorm.weight has shape [95]" in one_rank["wrong_shape"]
    assert one_rank["extra_parameter"].endswith("no rule of config/weight_map.py covers language_model.output_layer.scale")
