"""`glmv train` as a user runs it: a curve that stays, exact resume after a kill, other layouts, bad samples, dead ranks.

Real ranks over gloo, real shards with real pictures, the real command line. Equality after a resume is bit for bit in the same
layout; with another data-parallel size the batches are the same and only the order of sums differs (gate 1e-5, measured 2e-7).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Glm4vForConditionalGeneration

from megatron_glmv import cli
from megatron_glmv.config.base import load
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.model.inputs import make_inputs
from megatron_glmv.parallel import groups
from megatron_glmv.sequence.packed import pack
from megatron_glmv.training.assemble import assemble, assemble_model
from megatron_glmv.training.checkpoint import Checkpointer
from tests.data.pictures import draw, encode
from tests.data.processor import write_processor
from tests.data.rows import default_pictures, measure, write_rows
from tests.model import oracle
from tests.ranks import run_ranks
from tests.stages import REPOSITORY, start_stage
from tests.training.runs import EVERY, STEPS, config_file, steps_of, train, wait_for_step

GOLDEN = Path(__file__).with_name("golden_loss.json")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "good", 23)

    def broken_pictures(row: int, number: int) -> list[Any]:
        if (row, number) != (3, 0):
            return default_pictures(row, number)
        whole = encode(draw(60, 100, 1))
        return [replace(measure(whole), data=whole[: len(whole) // 2])]

    write_rows(folder / "broken", 23, pictures=broken_pictures)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run that nothing disturbs, tensor 2."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = train(config_file(folder, "run", data / "good"), 2)
    assert code == 0, output
    assert "incomplete / corrupted" not in output, "Megatron warns of a folder that is not empty before it saves"
    return folder / "run"


def test_loss_follows_the_golden_curve(whole: Path) -> None:
    losses = {step: loss for step, (loss, _, _) in steps_of(whole).items()}
    golden = {int(step): loss for step, loss in json.loads(GOLDEN.read_text(encoding="utf-8")).items()}
    assert losses.keys() == golden.keys()
    # Another processor's kernels add in another order; over 20 steps that stays far below 1e-3.
    assert losses == pytest.approx(golden, rel=1e-3)


def test_a_killed_run_resumes_bit_for_bit(whole: Path, tmp_path: Path, data: Path) -> None:
    file = config_file(tmp_path, "run", data / "good")
    process = start_stage("train", file, 2)
    wait_for_step(tmp_path / "run", 2 * EVERY + 2, process)
    os.kill(process.pid, signal.SIGKILL)  # the launcher; its ranks end with it
    process.communicate()
    assert max(steps_of(tmp_path / "run")) < STEPS
    code, output = train(file, 2)
    assert code == 0, output
    assert "resuming" in output
    assert "Warning" not in output  # what Megatron says to developers
    assert steps_of(tmp_path / "run") == steps_of(whole)


def test_another_data_parallel_size_sees_the_same_batches(whole: Path, tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole / "checkpoints" / f"step_{2 * EVERY:08d}", run / "checkpoints" / f"step_{2 * EVERY:08d}")
    file = config_file(tmp_path, "run", data / "good", parallel={"tensor": 1, "timeout_s": 60})
    code, output = train(file, 2, "checkpoint.asynchronous=true")
    assert code == 0, output
    reference, found = steps_of(whole), steps_of(run)
    assert min(found) == 2 * EVERY + 1
    for step, (loss, _, tokens) in found.items():
        assert tokens == reference[step][2]
        assert loss == pytest.approx(reference[step][0], rel=1e-5)
    assert (run / "checkpoints" / f"step_{STEPS:08d}" / "meta.json").is_file()


def test_a_larger_global_batch_goes_on_behind_the_rows_read(whole: Path, tmp_path: Path, data: Path) -> None:
    run, name = tmp_path / "run", f"step_{2 * EVERY:08d}"
    shutil.copytree(whole / "checkpoints" / name, run / "checkpoints" / name)
    file = config_file(tmp_path, "run", data / "good", steps=2 * EVERY + 1, global_batch_rows=8, parallel={"tensor": 1})
    code, output = train(file, 1)
    assert code == 0, output
    assert "a step takes 8 rows, not 4: going on at row 32 of the order of the data" in output
    assert "is another one" not in output
    reference = steps_of(whole)
    assert steps_of(run)[9][2] == reference[9][2] + reference[10][2], "the rows of two steps as they were"
    code, output = train(file, 1, f"steps={2 * EVERY + 2}", "seed=3")
    assert code == 0, output
    assert "rows may come again or be left out: seed is 3, not 1234" in output


def test_an_undecodable_picture_is_named_counted_and_not_trained(tmp_path: Path, data: Path) -> None:
    file = config_file(tmp_path, "run", data / "broken", steps=6)
    code, output = train(file, 2, "data.shuffle=false")
    assert code == 0, output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["bad_samples"] for record in records if "loss" in record][-1] == 1
    log = (tmp_path / "run" / "bad_samples_train_0.jsonl").read_text(encoding="utf-8")
    assert "s-3-0" in log
    # Row 3 is in the first step; its broken sample would have trained 11 tokens.
    clean = config_file(tmp_path, "clean", data / "good", steps=6)
    assert train(clean, 2, "data.shuffle=false")[0] == 0
    broken, whole = steps_of(tmp_path / "run"), steps_of(tmp_path / "clean")
    assert broken[1][2] == whole[1][2] - 11
    assert [broken[step][2] for step in range(2, 6)] == [whole[step][2] for step in range(2, 6)]


def test_a_killed_rank_ends_the_others_and_is_named(tmp_path: Path, data: Path) -> None:
    process = start_stage("train", config_file(tmp_path, "run", data / "good", steps=100000), 2)
    wait_for_step(tmp_path / "run", 3, process)
    rank = json.loads((tmp_path / "run" / "ranks" / "rank_0001.json").read_bytes().rstrip(b"\0 \n"))
    os.kill(rank["process"], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "rank 1" in output
    assert "step" in output.splitlines()[-1]


def compare_exported_logits(rank: int, file: str, run: str, folder: str) -> tuple[float, dict[str, Any]]:
    """Largest difference of logits between a run's trained weights and its exported folder, and how the folder loaded."""
    config = load(TrainConfig, [file], ["parallel.tensor=1"])
    groups.initialize(config.parallel, seed=1)
    [model] = models = assemble_model(config)
    assembly = assemble(config, models)
    Checkpointer(config, assembly.chunks, assembly.optimizer).load_weights_only(Path(run))
    hf, loading = Glm4vForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    worst = 0.0
    for case in oracle.all_cases(config.model.shape).values():
        tokens, ids = sum(len(document.tokens) for document in case.documents), config.model.shape.tokens
        row = pack(case.documents, tokens, image_token=ids.image, pad_token=ids.pad, patches=case.patches)
        with torch.no_grad():
            logits = model(make_inputs(row, config.model.shape, torch.device("cpu")), return_logits=True)[:, 0]
        worst = max(worst, float((logits - torch.cat(oracle.case_logits(hf.eval(), case))).abs().max()))
    return worst, {kind: sorted(map(str, names)) for kind, names in loading.items() if names}


def test_the_exported_folder_computes_what_the_trained_model_computes(whole: Path, tmp_path: Path) -> None:
    write_processor(tmp_path / "processor")
    assert cli.main(["export", str(whole), str(tmp_path / "hf"), "--processor", str(tmp_path / "processor")]) == 0
    file = whole.parent / "run.yaml"
    arguments = (str(file), str(whole), str(tmp_path / "hf"))
    worst, faults = run_ranks(compare_exported_logits, 1, *arguments)[0]
    assert not faults
    assert worst <= 3e-4  # the gate of tests/model/test_parity.py


def error_line(output: str) -> str:
    """The one line that a user is told, and no traceback."""
    assert "Traceback" not in output
    [line] = [line for line in output.splitlines() if line.startswith("glmv: error:")]
    return line


@pytest.mark.parametrize(
    ("override", "needle"),
    [
        ("data.sequence_length=64", "sequence_length"),
        ("data.sources=[{name: x, path: /nowhere}]", "/nowhere/index.json"),
    ],
    ids=["row longer than the sequence", "no data set"],
)
def test_bad_input_is_one_line(tmp_path: Path, data: Path, override: str, needle: str) -> None:
    code, output = train(config_file(tmp_path, "run", data / "good", parallel={"timeout_s": 60}), 1, override)
    assert code == 1, output
    assert needle in error_line(output)


def test_a_checkpoint_of_another_architecture_is_refused_in_one_line(whole: Path, tmp_path: Path, data: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(whole / "checkpoints")
    model = {"hf_folder": str(other_architecture(tmp_path)), "load_weights": False}
    code, output = train(config_file(tmp_path, "run", data / "good", parallel={"timeout_s": 60}, model=model), 1)
    assert code == 1, output
    assert "num_layers" in error_line(output)


def other_architecture(folder: Path) -> Path:
    """A Hugging Face folder of the preset with fewer layers."""
    preset = REPOSITORY / "megatron_glmv" / "config" / "presets" / "digits.json"
    tree = json.loads(preset.read_text(encoding="utf-8"))
    tree["text_config"]["num_hidden_layers"] = 2
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    return folder / "other"


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "data", 6)
    shard = min((tmp_path / "data").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    code, output = train(config_file(tmp_path, "run", tmp_path / "data", parallel={"timeout_s": 60}), 1)
    assert code == 1, output
    assert shard.name in error_line(output)
