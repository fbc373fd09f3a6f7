"""Adapters against peft on transformers' model: logits, gradients, the exported folder, the merged model, and bad input.

One rank builds the model with random adapters on every linear layer of both towers (and on some), computes, and saves with the
training loop's own checkpoints; the exports then run in this process, and peft loads what they wrote. Gates as in
tests/model/test_parity.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from megatron_glmv import cli
from megatron_glmv.config.base import ConfigError
from megatron_glmv.config.linears import adapted_layers, count_adapters, linear_layers
from megatron_glmv.config.lora import LoraConfig
from megatron_glmv.config.model import ModelConfig
from megatron_glmv.config.weight_map import MappingError, hf_names
from megatron_glmv.convert import lora
from megatron_glmv.convert.command import run_adapter, run_export
from megatron_glmv.convert.peft_export import export_adapters, target_modules
from megatron_glmv.run_folder.checkpoint_folder import find
from tests.convert.checkpoints import change_manifest
from tests.data.processor import write_processor
from tests.model import adapters, oracle
from tests.ranks import leave_layout, run_ranks

SHAPE = oracle.model_shape("digits")
CASES = ("text_only", "several_images", "video_before_image")
TARGETS = {"everything": adapters.EVERYTHING, "some": adapters.SOME}


def compute_and_save(rank: int, folder: str) -> dict[str, Any]:
    """For each kind: logits and adapters' gradients of every case by Hugging Face layer, and a checkpoint."""
    from megatron_glmv.config.training import TrainConfig
    from megatron_glmv.parallel import groups
    from megatron_glmv.training.assemble import assemble
    from megatron_glmv.training.checkpoint import Checkpointer
    from megatron_glmv.training.state import TrainState

    found: dict[str, Any] = {}
    for kind, targets in TARGETS.items():
        tree = adapters.lora_config(folder, {}, {}, targets=targets).model_dump()
        config = TrainConfig.model_validate(tree | {"run_folder": Path(folder) / kind})
        groups.initialize(config.parallel, seed=1)
        models = adapters.build(config)
        found[kind] = {
            name: _compute(models[0], config, case) for name, case in oracle.all_cases(SHAPE).items() if name in CASES
        }
        assembly = assemble(config, models)
        checkpointer = Checkpointer(config, assembly.chunks, assembly.optimizer)
        checkpointer.save(TrainState(step=3))
        checkpointer.close()
        leave_layout()
    return found


def _compute(model: Any, config: Any, case: oracle.Case) -> tuple[list[Tensor], dict[str, tuple[Tensor, Tensor]]]:
    from megatron_glmv.model.inputs import make_inputs
    from megatron_glmv.sequence.packed import pack

    special, length = SHAPE.tokens, sum(len(document.tokens) for document in case.documents) + 5
    row = pack(case.documents, length, image_token=special.image, pad_token=special.pad, patches=case.patches, key=case.name)
    inputs = make_inputs(row, SHAPE, torch.device("cpu"))
    with torch.no_grad():
        logits = model(inputs, return_logits=True)[:, 0]
    model.zero_grad()
    (model(inputs)[0] * inputs.loss_weights[0]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    by_layer: dict[str, tuple[Tensor, Tensor]] = {}
    for module in lora.adapter_plans(config.model.lora, SHAPE):
        a, b = (gradients[f"{module}.adapter.{kind}"] for kind in ("lora_A", "lora_B"))
        by_layer |= lora.hf_adapters(module, a, b, config.model.lora, SHAPE)
    return [logits[start:end] for _, start, end in row.documents], by_layer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "config.json").write_text(json.dumps(oracle.hf_config("digits")))
    torch.save(run_ranks(compute_and_save, 1, str(folder))[0], folder / "computed.pt")
    return folder


@pytest.fixture
def processor(tmp_path: Path) -> Path:
    return write_processor(tmp_path / "processor")


def peft_model(folder: Path) -> Any:
    """The model of transformers, to whose linear layers peft has added the folder's adapters."""
    return PeftModel.from_pretrained(oracle.random_model("digits"), folder, is_trainable=True).eval()


@pytest.mark.parametrize("kind", TARGETS)
def test_the_exported_folder_is_what_was_trained(runs: Path, tmp_path: Path, kind: str) -> None:
    """Logits and gradients of peft with the folder on transformers' model, layer by layer."""
    assert run_adapter(runs / kind, tmp_path / "adapter") == 0
    model = peft_model(tmp_path / "adapter").base_model.model
    learn = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    computed = torch.load(runs / "computed.pt")[kind]
    plain = oracle.random_model("digits")
    for name, (logits, gradients) in computed.items():
        case = oracle.all_cases(SHAPE)[name]
        expected = oracle.case_logits(model, case)
        assert max(float((own - its).abs().max()) for own, its in zip(logits, expected, strict=True)) <= 3e-4
        without = oracle.case_logits(plain, case)
        assert min(float((own - its).abs().max()) for own, its in zip(logits, without, strict=True)) > 0.1
        _, its_gradients = oracle.case_gradients(model, case)
        assert learn == {f"{layer}.lora_{factor}.default.weight" for layer in gradients for factor in "AB"}
        largest = max(float(its_gradients[key].norm()) for key in learn)
        for layer, own in gradients.items():
            for factor, gradient in zip("AB", own, strict=True):
                its = its_gradients[f"{layer}.lora_{factor}.default.weight"]
                assert float((gradient - its).norm()) <= 1e-4 * max(float(its.norm()), 1e-6 * largest), (
                    f"{name}: {layer} {factor}"
                )


@pytest.mark.parametrize("kind", TARGETS)
def test_peft_finds_every_key_and_no_other(runs: Path, tmp_path: Path, kind: str) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    report = export_adapters(find(runs / kind), tmp_path / "adapter", SHAPE)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert config.base_model_name_or_path == str(runs)
    model = get_peft_model(oracle.random_model("digits"), config)
    loading = set_peft_model_state_dict(model, tensors)
    assert not loading.unexpected_keys
    assert not [key for key in loading.missing_keys if "lora_" in key]
    adapted = adapted_layers(LoraConfig(rank=4, alpha=8, targets=TARGETS[kind]), SHAPE)
    assert set(tensors) == {f"base_model.model.{name}.lora_{factor}.weight" for name in adapted for factor in "AB"}
    assert (report.num_adapters, report.dtype) == (len(adapted), "float32")
    assert (config.r, config.lora_alpha, config.peft_type.value) == (4, 8, "LORA")


@pytest.mark.parametrize("kind", TARGETS)
def test_the_merged_export_is_the_same_model(runs: Path, processor: Path, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForImageTextToText

    assert run_export(runs / kind, tmp_path / "hf", processor=processor) == 0
    merged, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", output_loading_info=True, dtype="auto")
    assert not any(loading.values()), loading
    run_adapter(runs / kind, tmp_path / "adapter")
    expected = peft_model(tmp_path / "adapter").merge_and_unload().state_dict()
    assert merged.state_dict().keys() == expected.keys()
    plain = oracle.random_model("digits").state_dict()
    adapted = adapted_layers(LoraConfig(rank=4, alpha=8, targets=TARGETS[kind]), SHAPE)
    for name, weight in merged.state_dict().items():
        assert torch.allclose(weight, expected[name], rtol=0, atol=1e-6), name
        assert torch.equal(weight, plain[name]) == (name.removesuffix(".weight") not in adapted), name
    for name, (logits, _) in torch.load(runs / "computed.pt")[kind].items():
        its = oracle.case_logits(merged.eval(), oracle.all_cases(SHAPE)[name])
        assert max(float((own - other).abs().max()) for own, other in zip(logits, its, strict=True)) <= 3e-4


def test_a_merged_weight_is_rounded_once_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = lora.AdapterPlan(2, 24, ((0, 5), (None, 3), (1, 7), (0, 2)), "rows")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(17, 24, generator=generator).bfloat16()
    a, b = torch.randn(6, 24, generator=generator).bfloat16(), torch.randn(17, 3, generator=generator).bfloat16()
    exact = weight.double()
    for adapter, rows in ((0, range(5)), (1, range(8, 15)), (0, range(15, 17))):
        for row in rows:
            exact[row] += 2.5 * (b[row].double() @ a[3 * adapter : 3 * adapter + 3].double())
    monkeypatch.setattr(lora, "BLOCK_ELEMENTS", 24 * 3)
    merged = weight.clone()
    lora.merge(merged, a, b, plan, 2.5)
    assert torch.equal(merged, exact.bfloat16())
    assert torch.equal(merged[5:8], weight[5:8])


def test_the_table_of_linear_layers_is_the_weight_maps() -> None:
    """Every matrix but convolutions, embeddings and norms, with its shape; for both variants and the 9B."""
    for shape in (SHAPE, oracle.model_shape("grouped"), ModelConfig(preset="glm-4.1v-9b").shape):
        matrices = {name: size for name, size in hf_names(shape).items() if len(size) == 2 and "embed" not in name}
        layers = linear_layers(shape)
        assert {f"{name}.weight": (layer.outputs, layer.inputs) for name, layer in layers.items()} == matrices


def test_target_modules_mean_the_adapted_layers_alone() -> None:
    def named(*patterns: str) -> list[str]:
        return target_modules(adapted_layers(LoraConfig(targets=patterns), SHAPE), SHAPE)

    assert named("q_proj", "v_proj") == ["q_proj", "v_proj"]
    assert named("language_model.*.down_proj") == [f"layers.{n}.mlp.down_proj" for n in range(4)]
    # A convolution is called proj, too.
    assert named("attn.proj", "merger.proj") == ["attn.proj", "merger.proj"]
    assert named("lm_head", "layers.1.*.k_proj") == ["layers.1.self_attn.k_proj", "lm_head"]


def test_counting_adapters() -> None:
    text = SHAPE.text
    count = count_adapters(LoraConfig(rank=3, targets=("q_proj", "lm_head")), SHAPE)
    query = text.num_heads * text.head_dim
    assert count == {
        "vision": 0,
        "merger": 0,
        "text": 3 * (text.num_layers * (text.hidden_size + query) + text.hidden_size + text.vocab_size),
    }


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("w_proj", "'w_proj' matches no linear layer"),
        ("language_model.layers.9.*", "matches no linear layer"),
        ("patch_embed.proj", "matches model.visual.patch_embed.proj, which is a convolution"),
        ("downsample", "matches model.visual.downsample, which is a convolution"),
        ("embed_tokens", "matches model.language_model.embed_tokens, which is an embedding"),
        ("input_layernorm", "matches no linear layer"),
    ],
)
def test_a_pattern_without_a_linear_layer_is_named(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as failure:
        adapted_layers(LoraConfig(targets=("q_proj", pattern)), SHAPE)
    assert "model.lora.targets" in str(failure.value)


def test_an_existing_folder_is_not_touched(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    assert cli.main(["export", str(runs / "some"), str(folder), "--adapter"]) == 1
    assert "adapter: exists already" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["mine"]


def _spoilt(runs: Path, folder: Path, **changes: Any) -> Path:
    checkpoint = shutil.copytree(find(runs / "some"), folder / "step_00000003")
    change_manifest(checkpoint, **changes)
    return checkpoint


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (None, "has no adapters"),
        ({"rank": 5, "alpha": 8, "targets": list(adapters.SOME)}, r"lora_A has shape \[.*\], this"),
        ({"rank": 4, "alpha": 8, "targets": ["q_proj"]}, "has .*adapter.*, unlike what lora"),
        ({"rank": 4, "alpha": 8, "targets": ["*"]}, "lacks .*adapter.*, unlike what lora"),
        ({"rank": 4, "alpha": 8, "targets": ["nothing"]}, "'nothing' matches no linear layer"),
        ("yes", "its manifest names adapters"),
    ],
)
def test_a_checkpoint_with_other_adapters_is_named(runs: Path, tmp_path: Path, changed: Any, message: str) -> None:
    checkpoint = _spoilt(runs, tmp_path, lora=changed)
    with pytest.raises(MappingError, match=message) as failure:
        export_adapters(checkpoint, tmp_path / "adapter", SHAPE)
    assert "\n" not in str(failure.value)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def test_adapters_that_the_manifest_does_not_name_are_not_left_out_in_silence(
    runs: Path, processor: Path, tmp_path: Path
) -> None:
    with pytest.raises(MappingError, match=r"has .*adapter.*, unlike what lora"):
        run_export(_spoilt(runs, tmp_path, lora=None), tmp_path / "hf", processor=processor)


def test_a_lost_file_leaves_no_folder(runs: Path, tmp_path: Path) -> None:
    checkpoint = _spoilt(runs, tmp_path)
    for file in checkpoint.glob("*.distcp"):
        file.unlink()
    with pytest.raises(MappingError, match="cannot be read"):
        export_adapters(checkpoint, tmp_path / "adapter", SHAPE)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
