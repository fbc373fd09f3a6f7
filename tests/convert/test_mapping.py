"""The table of weights: complete against transformers, bit-equal there and back and through every cut, and able to fail."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Glm4vConfig, Glm4vForConditionalGeneration

from megatron_glmv.config import weight_map
from megatron_glmv.config.model import PRESETS, ModelConfig, ModelShape
from megatron_glmv.config.weight_map import MappingError
from megatron_glmv.convert import mapping
from megatron_glmv.convert.hf_config import config_json
from tests.model import oracle

PRESET_NAMES = ("digits", "glm-4.1v-9b", "glm-4.6v-flash")
NINE_BILLION_TINY = {
    "text": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 108, "head_dim": 4, "vocab_size": 148, "rotary_dim": 2},
    "vision": {
        "num_layers": 2,
        "hidden_size": 48,
        "ffn_hidden_size": 64,
        "out_hidden_size": 64,
        "merger_ffn_hidden_size": 52,
        "position_grid": 3,
    },
}
"""The 9B preset's 32 heads over 2 key/value heads and 12 ViT heads, everything else small."""


def _tiny_nine_billion():
    shape = ModelConfig(preset="glm-4.1v-9b").shape
    text, vision = (getattr(shape, part).model_copy(update=small) for part, small in NINE_BILLION_TINY.items())
    return shape.model_copy(update={"text": text, "vision": vision})


SHAPES = {"digits": oracle.model_shape("digits"), "grouped": oracle.model_shape("grouped"), "9b": _tiny_nine_billion()}


def _random_tensors(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator).to(dtype) for name, size in weight_map.hf_names(shape).items()}


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


@pytest.mark.parametrize(("preset", "tensors"), zip(PRESET_NAMES, (82, 704, 704), strict=True))
def test_names_and_shapes_are_those_of_transformers(preset, tensors):
    model_config = ModelConfig(preset=preset)
    with torch.device("meta"):
        model = Glm4vForConditionalGeneration(Glm4vConfig(**model_config.hf_config))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert weight_map.hf_names(model_config.shape) == expected
    assert len(expected) == tensors


def test_nine_billion_parameters():
    shape = ModelConfig(preset="glm-4.1v-9b").shape
    assert sum(torch.Size(size).numel() for size in weight_map.megatron_names(shape).values()) == 10_292_777_472


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_configuration_there_and_back(preset):
    tree = json.loads((PRESETS / f"{preset}.json").read_text(encoding="utf-8"))
    assert config_json(ModelShape.from_hf(tree, preset), tree["dtype"]) == tree


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_equal(shape, dtype):
    tensors = _random_tensors(shape, dtype)
    returned = {}
    for name, size in weight_map.megatron_names(shape).items():
        full = mapping.to_megatron(name, tensors, shape)
        assert tuple(full.shape) == size
        returned |= mapping.to_hf(name, full, shape)
    assert returned.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(returned[name], tensor), name


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
def test_slices_joined_are_the_tensor(tensor_size):
    for shape in (SHAPES["digits"], SHAPES["9b"]):
        tensors = _random_tensors(shape)
        for name in weight_map.megatron_names(shape):
            full = mapping.to_megatron(name, tensors, shape)
            shards = [mapping.slice_for_rank(name, full, rank, tensor_size) for rank in range(tensor_size)]
            assert torch.equal(mapping.join_ranks(name, shards), full), name
            shrinks = weight_map.split_of(name) != "whole"
            assert shards[0].numel() * (tensor_size if shrinks else 1) == full.numel()


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
def test_segments_of_a_rank_are_its_slice(tensor_size):
    """What import reads of the files is what slicing the whole tensor gives, also where 4 ranks share 2 key/value heads."""
    for shape in (SHAPES["digits"], SHAPES["9b"]):
        tensors = _random_tensors(shape)
        for name, found in weight_map.entries(shape).items():
            sources = [tensors[source].reshape(len(tensors[source]), -1) for source in found.hf_names]
            for rank in range(tensor_size):
                part = weight_map.part_of_rank(name, found.shape, rank, tensor_size)
                rows = torch.cat([sources[s.source][s.start : s.stop] for s in weight_map.rank_segments(found, part)])
                columns = slice(*part.columns) if part.columns else slice(None)
                expected = mapping.slice_for_rank(name, mapping.to_megatron(name, tensors, shape), rank, tensor_size)
                assert torch.equal(rows[:, columns].reshape(expected.shape), expected), name


def test_grouped_query_layout():
    """Megatron's rows: for each key/value head its queries, its key, its value; checked against the definition head by head."""
    shape = SHAPES["9b"]
    tensors = _random_tensors(shape)
    prefix, width, per_group = "model.language_model.layers.1.self_attn.", shape.text.head_dim, 16
    name = "language_model.decoder.layers.1.self_attention.linear_qkv.weight"
    groups = mapping.to_megatron(name, tensors, shape).view(2, per_group + 2, width, shape.text.hidden_size)
    query, key, value = (tensors[f"{prefix}{part}_proj.weight"].view(-1, width, shape.text.hidden_size) for part in "qkv")
    for group in range(2):
        assert torch.equal(groups[group, :per_group], query[group * per_group : (group + 1) * per_group])
        assert torch.equal(groups[group, per_group], key[group])
        assert torch.equal(groups[group, per_group + 1], value[group])


def test_vision_query_layout(shape):
    vision = shape.vision
    tensors = _random_tensors(shape)
    fused = tensors["model.visual.blocks.0.attn.qkv.weight"]
    expected = fused.view(3, vision.num_heads, vision.head_dim, vision.hidden_size).transpose(0, 1).reshape(fused.shape)
    name = "vision_model.decoder.layers.0.self_attention.linear_qkv.weight"
    assert torch.equal(mapping.to_megatron(name, tensors, shape), expected)


def test_rank_of_a_gated_product_holds_gate_and_up():
    shape = SHAPES["digits"]
    tensors = _random_tensors(shape)
    name, prefix = "vision_projection.mlp.linear_fc1.weight", "model.visual.merger."
    gate, up = tensors[prefix + "gate_proj.weight"], tensors[prefix + "up_proj.weight"]
    second = mapping.slice_for_rank(name, mapping.to_megatron(name, tensors, shape), 1, 2)
    assert torch.equal(second, torch.cat((gate.chunk(2)[1], up.chunk(2)[1])))


def test_every_rule_is_used_and_every_row_once(shape):
    used = {name.replace(f".layers.{n}.", ".layers.{n}.") for name in weight_map.entries(shape) for n in range(9)}
    assert {rule.megatron for rule in weight_map.RULES} <= used
    for name, found in weight_map.entries(shape).items():
        rows = [(s.source, row) for s in found.segments for row in range(s.start, s.stop)]
        expected = [(source, row) for source, size in enumerate(found.hf_shapes) for row in range(size[0])]
        assert sorted(rows) == expected, name


def test_unknown_names_are_errors():
    shape = SHAPES["digits"]
    for function in (weight_map.split_of, lambda name: weight_map.entry(name, shape)):
        with pytest.raises(MappingError, match=r"no rule .* covers the Megatron parameter language_model\.decoder\.bias"):
            function("language_model.decoder.bias")
    with pytest.raises(MappingError, match=r"layers\.4\."):
        weight_map.entry("language_model.decoder.layers.4.post_mlp_layernorm.weight", shape)


def test_missing_and_misshapen_tensors_are_errors():
    shape = SHAPES["digits"]
    tensors = _random_tensors(shape)
    name, source = "language_model.decoder.layers.0.self_attention.linear_qkv.bias", "self_attn.v_proj.bias"
    without = {key: tensor for key, tensor in tensors.items() if not key.endswith(source)}
    with pytest.raises(MappingError, match=r"layers\.0\.self_attn\.v_proj\.bias is missing"):
        mapping.to_megatron(name, without, shape)
    with pytest.raises(MappingError, match=r"v_proj\.bias: shape \[32\], but this architecture has \[64\]"):
        mapping.to_megatron(name, {k: t[:32] if k.endswith(source) else t for k, t in tensors.items()}, shape)
    with pytest.raises(MappingError, match=r"shape \[12\], but this architecture has \[256\]"):
        mapping.to_hf(name, torch.zeros(12), shape)


def test_name_sets_are_compared_both_ways():
    weight_map.check_names(["a", "b"], ["b", "a"], "here")
    with pytest.raises(MappingError, match=r"here: no rule .* covers c, d, e and 1 more"):
        weight_map.check_names([*"abcdef"], [*"ab"], "here")
    with pytest.raises(MappingError, match="here: missing b"):
        weight_map.check_names(["a"], ["a", "b"], "here")


def test_indivisible_tensors_are_errors():
    name = "language_model.decoder.layers.0.mlp.linear_fc1.weight"
    with pytest.raises(MappingError, match="4 gated rows cannot be divided over 3 tensor ranks"):
        mapping.slice_for_rank(name, torch.zeros(8, 2), 0, 3)
