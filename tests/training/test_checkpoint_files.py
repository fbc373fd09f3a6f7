"""Which folders count as checkpoints, which stay, and which configuration may use one; no tensors needed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_glmv.config.base import validate
from megatron_glmv.config.training import CheckpointConfig, TrainConfig
from megatron_glmv.run_folder import checkpoint_folder as folders
from megatron_glmv.run_folder.checkpoint_folder import CheckpointError
from megatron_glmv.training import checkpoint_files as files

LAYOUT = {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "context": 1, "data": 1}


def make_config(run_folder: Path, preset: str = "digits", **tree: Any) -> TrainConfig:
    model = {"preset": preset, "freeze": tree.pop("freeze", ()), "lora": tree.pop("lora", None)}
    data = {"sequence_length": 64, "sources": [{"name": "a", "path": "unused"}]}
    return validate(
        TrainConfig,
        {"run_folder": run_folder, "steps": 9, "global_batch_rows": 1, "model": model, "data": data, **tree},
    )


def save(run_folder: Path, step: int, config: TrainConfig | None = None) -> Path:
    """Write a checkpoint's files as a save does, without tensors."""
    folder = folders.folder_of(run_folder, step)
    partial = folders.open_partial(folder, needed_bytes=0)
    manifest = {"step": step, "state": {}, **files.describe_run(config or make_config(run_folder), LAYOUT)}
    folders.publish(partial, folder, manifest, "steps: 9\n")
    return folder


def test_only_complete_folders_count(tmp_path: Path) -> None:
    assert folders.latest(tmp_path) is None
    first = save(tmp_path, 5)
    assert (first.name, folders.latest(tmp_path)) == ("step_00000005", first)
    killed_before_the_rename = folders.open_partial(folders.folder_of(tmp_path, 7), needed_bytes=0)
    (killed_before_the_rename / "meta.json").write_text("{}")
    (tmp_path / "checkpoints" / "step_00000008").mkdir()  # no manifest
    (tmp_path / "checkpoints" / "step_00000006.removing").mkdir()
    (tmp_path / "checkpoints" / "step_00000006.removing" / "meta.json").write_text("{}")
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    assert folders.latest(tmp_path) == first
    assert {folder.name for folder in files.clean_leftovers(tmp_path)} == {"step_00000007.partial", "step_00000006.removing"}
    assert {entry.name for entry in (tmp_path / "checkpoints").iterdir()} == {"step_00000005", "step_00000008", "notes.txt"}


def test_steps_sort_as_numbers(tmp_path: Path) -> None:
    for step in (999_999_999, 20, 100_000_000):
        save(tmp_path, step)
    assert list(folders.complete_folders(tmp_path)) == [20, 100_000_000, 999_999_999]


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(1, None, [6]), (2, None, [5, 6]), (9, None, [1, 2, 3, 4, 5, 6]), (1, 3, [3, 6]), (2, 2, [2, 4, 5, 6])],
)
def test_retention(tmp_path: Path, keep: int, keep_every: int | None, left: list[int]) -> None:
    for step in range(1, 7):
        save(tmp_path, step)
    files.retire(tmp_path, CheckpointConfig(keep=keep, keep_every_steps=keep_every))
    assert list(folders.complete_folders(tmp_path)) == left
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(left), "nothing half-removed stays"


def test_find_takes_a_run_or_one_checkpoint(tmp_path: Path) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    assert folders.find(tmp_path) == newer
    assert folders.find(older) == older
    with pytest.raises(CheckpointError, match="nowhere: holds no complete checkpoint"):
        folders.find(tmp_path / "nowhere")


def test_manifest_says_what_was_saved(tmp_path: Path) -> None:
    manifest = folders.read_manifest(save(tmp_path, 3))
    assert manifest["step"] == 3 and manifest["layout"] == LAYOUT
    assert manifest["shape"]["text"]["num_layers"] == make_config(tmp_path).model.shape.text.num_layers
    assert {"torch", "megatron-core"} <= set(manifest["versions"])
    assert (folders.latest(tmp_path) / "config.yaml").read_text() == "steps: 9\n"  # type: ignore[operator]


def test_another_architecture_is_refused_by_its_first_number(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    manifest = folders.read_manifest(folder)
    folders.check_architecture(folder, manifest, make_config(tmp_path).model.shape)
    other = make_config(tmp_path, preset="glm-4.1v-9b")
    small, large = make_config(tmp_path).model.shape.text.num_layers, other.model.shape.text.num_layers
    expected = f"text.num_layers is {small} in the checkpoint and {large} in the configuration"
    with pytest.raises(CheckpointError, match=expected) as raised:
        folders.check_architecture(folder, manifest, other.model.shape)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"precision": {"dtype": "fp32"}}, "precision.dtype was bf16 when it was saved and is fp32 now"),
        ({"parallel": {"distributed_optimizer": False}}, "parallel.distributed_optimizer was True .* and is False now"),
        ({"freeze": ["vision"]}, "model.freeze was .* and is .'vision'. now"),
        ({"lora": {"rank": 4, "targets": ["q_proj"]}}, "model.lora was None when it was saved and is .'rank': 4"),
    ],
)
def test_another_kind_of_optimizer_state_is_refused(tmp_path: Path, tree: dict[str, Any], expected: str) -> None:
    folder = save(tmp_path, 3)
    manifest = folders.read_manifest(folder)
    files.check_resumable(folder, manifest, make_config(tmp_path))
    with pytest.raises(CheckpointError, match=expected):
        files.check_resumable(folder, manifest, make_config(tmp_path, **tree))


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"format": 99}), ""])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    folder = save(tmp_path, 3)
    (folder / "meta.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"meta\.json"):
        folders.read_manifest(folder)


def test_a_manifest_that_names_no_model_type_is_glm4v(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    manifest = folders.read_manifest(folder)
    del manifest["shape"]["model_type"]
    folders.check_architecture(folder, manifest, make_config(tmp_path).model.shape)


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    kept = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"needs 1000000000\.0 GB and the disk has .* older checkpoints are untouched"):
        folders.open_partial(folders.folder_of(tmp_path, 2), needed_bytes=10**18)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == [kept.name]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="cannot be created"):
        folders.open_partial(folders.folder_of(tmp_path, 2), needed_bytes=0)


def test_publishing_writes_the_manifest_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails on the last file leaves a folder that does not count."""
    failing = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "config.yaml":
            raise OSError(28, "No space left on device")
        failing(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tmp_path, 4)
    assert folders.latest(tmp_path) is None
    assert not list(tmp_path.rglob("meta.json"))
