"""A run's checkpoint as a Hugging Face folder: complete, bit-equal from any layout, and absent when anything goes wrong.

One spawn of four ranks saves with the training loop's own checkpoints, optimizer state included; the export then runs in this
process without any process group.
"""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from megatron_glmv.config.base import InputError, validate
from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.config.weight_map import MappingError, hf_names
from megatron_glmv.convert.command import run_export
from megatron_glmv.convert.hf_export import export_checkpoint
from megatron_glmv.convert.hf_folder import HfWeights
from megatron_glmv.convert.processor import ProcessorError
from megatron_glmv.run_folder.checkpoint_folder import find, read_manifest
from tests.convert.checkpoints import change_manifest
from tests.convert.test_processor import RELEASED, WRITERS
from tests.model import oracle
from tests.ranks import leave_layout, run_ranks

LAYOUTS = {
    "fp32": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "overlap": False},
    "bf16": {"tensor": 4, "overlap": False},
    "flash": {"tensor": 2, "pipeline": 2, "vision": "images", "overlap": False},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "flash": torch.float32}
VARIANTS = {"fp32": "digits", "bf16": "digits", "flash": "flash"}


def _save(rank, folder):
    """Save the oracle's weights in every layout of LAYOUTS, with the optimizer that belongs to it."""
    from megatron_glmv.convert.hf_import import from_state_dict
    from megatron_glmv.parallel import groups
    from megatron_glmv.training.assemble import assemble, assemble_model
    from megatron_glmv.training.checkpoint import Checkpointer
    from megatron_glmv.training.state import TrainState

    for name, layout in LAYOUTS.items():
        variant = VARIANTS[name]
        tree = {
            "run_folder": folder / name,
            "steps": 30,
            "global_batch_rows": 4,
            "model": {"hf_folder": folder / variant, "load_weights": False},
            "parallel": layout,
            "precision": {"dtype": "bf16" if name == "bf16" else "fp32", "layers": "torch"},
            "data": {"sequence_length": 64, "sources": [{"name": "a", "path": "unused"}]},
            "optimizer": {"lr": 0.0},
        }
        config = validate(TrainConfig, tree)
        groups.initialize(config.parallel, config.seed)
        models = assemble_model(config)
        from_state_dict(models, oracle.random_model(variant, seed=3).state_dict(), config.model.shape)
        assembly = assemble(config, models)
        for chunk in assembly.chunks:
            chunk.zero_grad_buffer()
        assembly.optimizer.step()  # with a rate of 0: gives the optimizer its state and leaves the weights
        checkpointer = Checkpointer(config, assembly.chunks, assembly.optimizer)
        for step in (9, 20):
            checkpointer.save(TrainState(step=step))
        checkpointer.close()
        leave_layout()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for variant, write_processor in WRITERS.items():
        write_processor(folder / variant)
        (folder / variant / "config.json").write_text(json.dumps(oracle.hf_config(variant)), encoding="utf-8")
    run_ranks(_save, 4, folder, timeout_s=300)
    return folder


@pytest.fixture
def processor(runs, tmp_path):
    return shutil.copytree(runs / "digits", tmp_path / "processor")


@pytest.fixture
def checkpoint(runs, tmp_path):
    """A private copy of the fp32 run's newest checkpoint, to be spoilt."""
    return shutil.copytree(find(runs / "fp32"), tmp_path / "step_00000020")


LOAD = """
import sys, torch
from transformers import AutoModelForImageTextToText
model, loading = AutoModelForImageTextToText.from_pretrained(sys.argv[1], output_loading_info=True, dtype="auto")
assert not any(loading.values()), loading
torch.save({"class": type(model).__name__, "dtype": model.dtype,
            "weights": model.state_dict(), "buffers": dict(model.named_buffers())}, sys.argv[2])
"""


def _load(folder):
    """What plain transformers loads from a folder, in an interpreter in which nothing of this project runs."""
    result = folder.parent / "loaded.pt"
    subprocess.run([sys.executable, "-c", LOAD, folder, result], check=True)
    return torch.load(result)


@pytest.mark.parametrize("name", LAYOUTS)
def test_exported_folder_is_the_model(runs, tmp_path, name):
    """Equal weights and equal buffers of the same class: with them the logits are equal. The processor is the run's own."""
    assert run_export(runs / name, tmp_path / "hf") == 0
    loaded, expected = _load(tmp_path / "hf"), oracle.random_model(VARIANTS[name], seed=3)
    assert loaded["class"] == type(expected).__name__
    assert loaded["dtype"] == DTYPES[name]
    assert loaded["weights"].keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(loaded["weights"][key], tensor.to(loaded["dtype"])), key
    for key, buffer in expected.named_buffers():
        assert torch.equal(loaded["buffers"][key], buffer), key


def test_exported_folder_holds_what_a_released_one_holds(runs, processor, tmp_path):
    report = export_checkpoint(find(runs / "fp32"), tmp_path / "hf", processor)
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {*RELEASED, "config.json", "tokenizer.model", "model.safetensors"}
    tree = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    assert ModelShape.from_hf(tree, "hf") == oracle.model_shape("digits")
    assert tree["text_config"]["rope_parameters"]["mrope_section"] == [2, 3, 3]
    assert (report.num_tensors, report.num_parameters, report.dtype) == (82, 1_122_720, "float32")
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_small_shards_have_an_index(runs, processor, tmp_path):
    limit = 500_000
    export_checkpoint(find(runs / "fp32"), tmp_path / "hf", processor, max_shard_bytes=limit)
    shards = sorted((tmp_path / "hf").glob("model-*-of-*.safetensors"))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(shards) > 5
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert max(path.stat().st_size for path in shards) < limit + 20_000
    assert index["metadata"]["total_size"] == 4 * 1_122_720
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    expected, loaded = oracle.random_model("digits", seed=3).state_dict(), _load(tmp_path / "hf")["weights"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert HfWeights(tmp_path / "hf").shapes == hf_names(oracle.model_shape("digits"))


def test_newest_complete_checkpoint_is_taken(runs, tmp_path):
    assert find(runs / "fp32").name == "step_00000020"
    run_folder = shutil.copytree(runs / "fp32", tmp_path / "run")
    (run_folder / "checkpoints" / "step_00000020" / "meta.json").unlink()
    assert find(run_folder).name == "step_00000009"
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        find(tmp_path / "nothing")


def _fails(checkpoint, processor, folder, message):
    with pytest.raises((MappingError, ProcessorError), match=message) as failure:
        export_checkpoint(checkpoint, folder, processor)
    assert "\n" not in str(failure.value)
    assert not folder.exists()
    assert not folder.with_name(folder.name + ".partial").exists()


def test_existing_folder_is_not_touched(runs, processor, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "mine").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="hf: exists already"):
        export_checkpoint(find(runs / "fp32"), folder, processor)
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_processor_of_the_relative_is_refused_before_anything_is_written(checkpoint, runs, tmp_path):
    _fails(checkpoint, runs / "flash", tmp_path / "hf", r"<\|image\|> has id 21, the model was trained with 15")


def test_truncated_checkpoint_is_named(checkpoint, processor, tmp_path):
    for file in checkpoint.glob("*.distcp"):
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size // 3)
    _fails(checkpoint, processor, tmp_path / "hf", r"step_00000020: .* cannot be read")


def test_lost_file_is_named(checkpoint, processor, tmp_path):
    for file in checkpoint.glob("*.distcp"):
        file.unlink()
    _fails(checkpoint, processor, tmp_path / "hf", r"cannot be read .*No such file")


def test_checkpoint_of_another_architecture_is_named(checkpoint, processor, tmp_path):
    shape = read_manifest(checkpoint)["shape"]
    shape["text"]["ffn_hidden_size"] += 8
    change_manifest(checkpoint, shape=shape)
    _fails(checkpoint, processor, tmp_path / "hf", r"linear_fc1\.weight has shape \[4, 512, 128\], .* \[528, 128\]")
    shape["text"]["num_layers"] = 5
    change_manifest(checkpoint, shape=shape)
    _fails(checkpoint, processor, tmp_path / "hf", "step_00000020: ")


def test_missing_layers_are_named(checkpoint, processor, tmp_path):
    shape = read_manifest(checkpoint)["shape"]
    shape["text"]["num_layers"] = 5
    change_manifest(checkpoint, shape=shape)
    _fails(checkpoint, processor, tmp_path / "hf", r"do not cover language_model\.decoder\.layers\.4\.")


class _Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a checkpoint was executed')",))


def test_index_with_code_is_refused(checkpoint, processor, tmp_path):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(_Harmful()))
    _fails(checkpoint, processor, tmp_path / "hf", r"not the index of a checkpoint \(it holds a builtins\.exec\)")


def test_full_disk_leaves_nothing(checkpoint, processor, tmp_path):
    """A limit on the size of files makes the kernel refuse the write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        _fails(checkpoint, processor, tmp_path / "hf", r"hf: cannot be written \(File too large\)")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_leftovers_of_a_killed_export_are_replaced(checkpoint, processor, tmp_path):
    (tmp_path / "hf.partial").mkdir()
    (tmp_path / "hf.partial" / "model-00001-of-00009.safetensors").write_bytes(b"half")
    export_checkpoint(checkpoint, tmp_path / "hf", processor)
    assert not (tmp_path / "hf.partial").exists()
    assert not (tmp_path / "hf" / "model-00001-of-00009.safetensors").exists()
