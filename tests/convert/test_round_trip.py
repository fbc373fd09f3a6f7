"""From a Hugging Face folder through Megatron layouts and back: nothing changes, and what changes is caught and named.

The road is that of a user: `glmv import`, training loading and saving checkpoints on several layouts, `glmv export`, and plain
transformers loading the result. Two spawns, of four and of three ranks, serve all.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_glmv.cli import main
from megatron_glmv.config import weight_map
from megatron_glmv.config.base import InputError, validate
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.convert import compare, hf_export
from megatron_glmv.convert.command import run_export, run_import, run_verify
from megatron_glmv.convert.hf_folder import HfWeights
from tests.convert.hf_folders import write_hf_folder
from tests.ranks import leave_layout, run_ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {
    4: {"tensor": 2, "pipeline": 2},
    3: {"tensor": 1, "pipeline": 3, "virtual_pipeline": 2},
}
"""Number of ranks -> the layout that they have."""


def _load_and_save(rank: int, folder: Path, sources: dict[str, Path]) -> None:
    """Start a run from each checkpoint's weights, as `checkpoint.start_from` does, and save it."""
    from megatron_glmv.parallel import groups
    from megatron_glmv.training.assemble import assemble, assemble_model
    from megatron_glmv.training.checkpoint import Checkpointer
    from megatron_glmv.training.state import TrainState

    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else groups.num_ranks()
    for dtype, source in sources.items():
        tree = {
            "run_folder": folder / dtype,
            "steps": 30,
            "global_batch_rows": 12,
            "model": {"hf_folder": folder / f"hf_{dtype}"},
            "parallel": {**LAYOUTS[world], "overlap": False},
            "precision": {"dtype": dtype, "layers": "torch"},
            "data": {"sequence_length": 64, "sources": [{"name": "a", "path": "unused"}]},
        }
        config = validate(TrainConfig, tree)
        groups.initialize(config.parallel, config.seed)
        assembly = assemble(config, assemble_model(config))
        checkpointer = Checkpointer(config, assembly.chunks, assembly.optimizer)
        checkpointer.load_weights_only(source)
        for chunk in assembly.chunks:
            chunk.zero_grad_buffer()
        checkpointer.save(TrainState(step=world))
        checkpointer.close()
        leave_layout()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf_DTYPE -> checkpoint_DTYPE (imported) -> DTYPE (a run with checkpoints of four ranks, then of three)."""
    folder = tmp_path_factory.mktemp("round_trip")
    for name, dtype in DTYPES.items():
        write_hf_folder(folder / f"hf_{name}", dtype)
        assert run_import(folder / f"hf_{name}", folder / f"checkpoint_{name}") == 0
    run_ranks(_load_and_save, 4, folder, {name: folder / f"checkpoint_{name}" for name in DTYPES}, timeout_s=200)
    run_ranks(_load_and_save, 3, folder, {name: folder / name for name in DTYPES}, timeout_s=200)
    return folder


LOAD = """
import sys, torch
from transformers import AutoModelForImageTextToText
model, loading = AutoModelForImageTextToText.from_pretrained(sys.argv[1], output_loading_info=True, dtype="auto")
assert not any(loading.values()), loading
torch.save(model.state_dict(), sys.argv[2])
"""


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_changes_through_layouts(folder: Path, tmp_path: Path, dtype: str) -> None:
    """One rank -> tensor 2 x pipeline 2 -> pipeline 3 x virtual 2 -> one folder, loaded by plain transformers."""
    assert [path.name for path in sorted((folder / dtype / "checkpoints").iterdir())] == ["step_00000003", "step_00000004"]
    source = folder / dtype / "checkpoints" / "step_00000003"
    manifest = json.loads((source / "meta.json").read_text(encoding="utf-8"))
    assert (manifest["layout"]["pipeline"], manifest["layout"]["virtual_pipeline"]) == (3, 2)
    assert run_export(source, tmp_path / "hf") == 0
    subprocess.run([sys.executable, "-c", LOAD, tmp_path / "hf", tmp_path / "loaded.pt"], check=True)
    loaded, expected = torch.load(tmp_path / "loaded.pt"), _tensors(folder / f"hf_{dtype}")
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == DTYPES[dtype]
        assert torch.equal(loaded[name], tensor), name


def test_the_proof_is_kept_beside_the_weights(folder: Path, tmp_path: Path) -> None:
    assert run_export(folder / "bf16", tmp_path / "hf") == 0
    parity = json.loads((tmp_path / "hf" / "parity.json").read_text(encoding="utf-8"))
    assert parity["passed"] and parity["failure"] is None
    assert parity["num_tensors"] == len(_tensors(tmp_path / "hf"))
    assert parity["checkpoint"]["layout"]["pipeline"] == 2 and parity["checkpoint"]["step"] == 4
    assert {"transformers", "megatron-core", "torch"} <= set(parity["versions"])
    found = subprocess.run(["sha256sum", tmp_path / "hf" / "model.safetensors"], capture_output=True, text=True, check=True)
    assert parity["files"]["model.safetensors"] == found.stdout.split()[0]
    assert set(parity["logits"]) == {"text", "one image", "several images", "video"}
    assert max(parity["logits"].values()) <= 5e-5  # measured 1e-5; the gate of a conversion is verify.TOLERANCE


def test_imported_weights_are_no_run_to_resume(folder: Path) -> None:
    """A checkpoint without an optimizer says what to do instead."""
    from megatron_glmv.run_folder.checkpoint_folder import CheckpointError, read_manifest
    from megatron_glmv.training.checkpoint_files import check_resumable

    manifest = read_manifest(folder / "checkpoint_fp32")
    config = {"run_folder": "x", "steps": 1, "global_batch_rows": 1, "model": {"preset": "digits"}}
    data = {"data": {"sequence_length": 64, "sources": [{"name": "a", "path": "unused"}]}}
    with pytest.raises(CheckpointError, match=r"no optimizer; .*checkpoint\.start_from"):
        check_resumable(folder / "checkpoint_fp32", manifest, validate(TrainConfig, config | data))


# Faults of a conversion. Each leaves nothing under the final name, and the message names what is wrong.


def _fails(action, target: Path, *needles: str) -> None:
    with pytest.raises(InputError) as failure:
        action()
    message = str(failure.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message, message
    assert not target.exists() and not target.with_name(target.name + ".partial").exists()


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch):
    """Replace lines of the weight map, in both of its readings."""

    def replace(change) -> None:
        monkeypatch.setattr(weight_map, "RULES", tuple(change(rule) for rule in weight_map.RULES))
        weight_map.entries.cache_clear()

    yield replace
    monkeypatch.undo()
    weight_map.entries.cache_clear()


def test_gate_and_up_swapped_in_the_table(folder: Path, tmp_path: Path, table) -> None:
    """The wrong table reads its own tensors back without a difference; only what the model computes shows it."""

    def swap(rule):
        if rule.megatron != "vision_model.decoder.layers.{n}.mlp.linear_fc1.weight":
            return rule
        return dataclasses.replace(rule, hf=dict(reversed(rule.hf.items())))

    table(swap)
    checkpoint = tmp_path / "checkpoint"
    _fails(
        lambda: run_import(folder / "hf_fp32", checkpoint),
        checkpoint,
        "every tensor is equal, but the logits",
        "vision layer 0",
    )


def test_query_heads_in_another_order_in_the_table(folder: Path, tmp_path: Path, table, monkeypatch) -> None:
    """Queries of the two key/value heads exchanged."""
    right = weight_map._segments

    def wrong(order, rows, shape):
        segments = right(order, rows, shape)
        if order != "text_qkv":
            return segments
        queries = iter([s for s in segments if s.source == 0][::-1])
        return tuple(next(queries) if s.source == 0 else s for s in segments)

    monkeypatch.setattr(weight_map, "_segments", wrong)
    table(lambda rule: rule)
    checkpoint = tmp_path / "checkpoint"
    _fails(lambda: run_import(folder / "hf_fp32", checkpoint), checkpoint, "every tensor is equal", "decoder layer 0")


def _export_changed(folder: Path, target: Path, monkeypatch, change) -> None:
    right = hf_export.to_hf
    monkeypatch.setattr(hf_export, "to_hf", lambda *args: {k: change(k, v) for k, v in right(*args).items()})
    run_export(folder / "fp32", target)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers.2.mlp.gate_up_proj.weight", lambda tensor: torch.cat(tensor.chunk(2)[::-1])),
        ("layers.4.self_attn.k_proj.bias", torch.zeros_like),
        ("layers.1.self_attn.q_proj.weight", lambda tensor: torch.cat(tensor.chunk(2)[::-1])),
        ("visual.merger.post_projection_norm.bias", torch.zeros_like),
        ("layers.5.mlp.down_proj.weight", lambda tensor: tensor.half().float()),
    ],
    ids=["gate and up swapped", "bias dropped", "query heads exchanged", "merger's bias dropped", "cast to fp16 and back"],
)
def test_a_tensor_written_wrong_is_named(folder: Path, tmp_path: Path, monkeypatch, name: str, change) -> None:
    target = tmp_path / "hf"
    wrong = lambda found, tensor: change(tensor) if found.endswith(name) else tensor  # noqa: E731
    _fails(lambda: _export_changed(folder, target, monkeypatch, wrong), target, name, "values are different")


def test_an_fp16_cast_is_named(folder: Path, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "hf"
    _fails(
        lambda: _export_changed(folder, target, monkeypatch, lambda name, tensor: tensor.half()),
        target,
        "model.visual.patch_embed.proj.weight",
        "torch.float16",
    )


@pytest.fixture
def hf(folder: Path, tmp_path: Path) -> Path:
    """A private copy of the fp32 folder, to be spoilt."""
    return shutil.copytree(folder / "hf_fp32", tmp_path / "hf")


def _rewrite(hf: Path, change) -> None:
    """Replace the shards by one file of changed tensors."""
    tensors = change(_tensors(hf))
    for file in hf.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, hf / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "needles"),
    [
        (lambda t: {k: v.half() if "q_proj.bias" in k else v for k, v in t.items()}, ("q_proj.bias is float16",)),
        (lambda t: {k: v.bfloat16() for k, v in t.items()}, ("config.json says float32", "bfloat16")),
        (lambda t: {k: v for k, v in t.items() if "3.self_attn.v_proj.bias" not in k}, ("missing", "3.self_attn.v_proj.bias")),
        (lambda t: t | {"model.visual.extra.weight": torch.zeros(2)}, ("no rule", "model.visual.extra.weight")),
        (lambda t: t | {"lm_head.weight": torch.zeros(2, 2)}, ("lm_head.weight", "[2, 2]")),
    ],
    ids=["one tensor in fp16", "another dtype than config.json", "bias missing", "extra tensor", "another shape"],
)
def test_a_folder_with_wrong_tensors_is_not_imported(hf: Path, tmp_path: Path, change, needles) -> None:
    _rewrite(hf, change)
    _fails(lambda: run_import(hf, tmp_path / "checkpoint"), tmp_path / "checkpoint", *needles)


def test_a_missing_shard_is_named(hf: Path, tmp_path: Path) -> None:
    shard = sorted(hf.glob("*.safetensors"))[2]
    shard.unlink()
    _fails(lambda: run_import(hf, tmp_path / "checkpoint"), tmp_path / "checkpoint", shard.name, "missing")


def test_a_truncated_shard_is_named(hf: Path, tmp_path: Path) -> None:
    shard = sorted(hf.glob("*.safetensors"))[2]
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 1000)
    _fails(lambda: run_import(hf, tmp_path / "checkpoint"), tmp_path / "checkpoint", shard.name, "not a complete safetensors")


def test_weights_in_pickles_are_not_read(hf: Path, tmp_path: Path) -> None:
    for file in hf.glob("*.safetensors*"):
        file.unlink()
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps(_Harmful()))
    _fails(lambda: run_import(hf, tmp_path / "checkpoint"), tmp_path / "checkpoint", "never from pickles")


def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """A limit on the size of files makes the kernel refuse the write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        _fails(lambda: run_import(folder / "hf_fp32", tmp_path / "checkpoint"), tmp_path / "checkpoint", "cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_too_small_is_seen_before(folder: Path, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    _fails(lambda: run_import(folder / "hf_fp32", tmp_path / "checkpoint"), tmp_path / "checkpoint", "the disk has 0.0 GB free")


def test_what_exists_is_not_touched(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(["import", str(folder / "hf_fp32"), str(tmp_path / "mine")]) == 1
    assert "mine: exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


class _Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a checkpoint was executed')",))


def test_code_in_a_folder_is_not_run(hf: Path, tmp_path: Path, capsys) -> None:
    """Transformers would run this file where remote code is trusted."""
    config = json.loads((hf / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "evil.Glm4vConfig", "AutoModelForImageTextToText": "evil.Model"}
    (hf / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (hf / "evil.py").write_text("raise SystemExit('code of a folder was executed')", encoding="utf-8")
    assert main(["import", str(hf), str(tmp_path / "checkpoint")]) == 0
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "exported")]) == 0
    assert not list((tmp_path / "exported").glob("*.py"))


# `glmv verify`


def test_verify_compares_any_two(folder: Path, tmp_path: Path, capsys) -> None:
    assert run_verify(folder / "hf_bf16", folder / "bf16", tmp_path / "report.json") == 0
    assert "passed: one model" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["passed"] is True


def test_verify_names_what_differs(folder: Path, hf: Path, capsys) -> None:
    _rewrite(hf, lambda t: {k: v + 1e-3 if k.endswith("blocks.1.norm2.weight") else v for k, v in t.items()})
    assert run_verify(hf, folder / "fp32") == 1
    printed = capsys.readouterr().out
    assert "model.visual.blocks.1.norm2.weight: 96 of 96 values are different" in printed
    assert "FAILED" in printed


def test_verify_sees_another_dtype(folder: Path, hf: Path) -> None:
    weights = HfWeights(folder / "hf_bf16")
    from megatron_glmv.convert.command import _tensors as stored_tensors

    stored = stored_tensors(folder / "checkpoint_fp32")
    name, what = next(compare.different_tensors(weights, stored, stored.shape, lambda done: None))
    assert (name, what) == (
        "model.visual.patch_embed.proj.weight",
        "torch.bfloat16 in the folder and torch.float32 in the checkpoint",
    )


def test_a_checkpoint_of_another_architecture_is_named(folder: Path, hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["num_hidden_layers"] = 5
    (hf / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=r"text\.num_layers is 6 in the checkpoint and 5"):
        run_verify(hf, folder / "fp32")
