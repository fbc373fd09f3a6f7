"""The command line: what it prints, its exit codes, and that checking a configuration never loads torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megatron_glmv import cli
from megatron_glmv.config.base import load
from megatron_glmv.config.summary import short, summarize, warnings
from megatron_glmv.config.training import TrainConfig

ROOT = Path(__file__).parents[1]
STAGE = """
run_folder: runs/x
steps: 120000
global_batch_rows: 1536
model: {preset: glm-4.1v-9b}
parallel: {tensor: 2}
data: {sequence_length: 8192, sources: [{name: a, path: data/a}]}
"""


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    path = tmp_path / "stage.yaml"
    path.write_text(STAGE)
    return path


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def glmv(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_glmv", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120, check=False)


def test_check_prints_the_tree_and_what_it_amounts_to(stage: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["check", str(stage), "seed=7"]) == 0
    out = capsys.readouterr().out
    assert yaml.safe_load(out)["seed"] == 7, "the output is a configuration again"
    for line in (
        "#   vision           682,246,656",
        "#   merger           210,251,776",
        "#   text           8,779,522,048",
        "#   head             620,756,992",
        "#   total         10,292,777,472",
        "# step          1,536 rows x 8,192 tokens = 12,582,912 tokens",
        "# stage         120,000 steps = 1,509,949,440,000 tokens (1.51 T)",
        "# one replica   2 ranks: tensor 2 x pipeline 1 x context 1",
        "# warning: data.sources: a: data/a/index.json is not here; write the folder with `glmv-data pack`",
    ):
        assert line in out.splitlines()
    assert "(2 to 3,072 ranks)" in out


def test_check_shows_what_learns_with_adapters(stage: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["check", str(stage), "model.lora.rank=8", "model.lora.targets=[q_proj, v_proj]"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "#   vision           682,246,656  frozen" in out
    assert "#   adapters           4,014,080  learn, 0.04% of the model: text 4,014,080" in out
    assert "# lora          rank 8, alpha 32 on 80 of 365 linear layers" in out
    assert "# warning: model.lora: the frozen weights are random and never learn" in out


def test_a_pattern_that_matches_nothing_is_one_line_and_code_2(stage: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["check", str(stage), "model.lora.targets=[downsample]"]) == 2
    error = capsys.readouterr().err
    assert "model.lora.targets: 'downsample' matches model.visual.downsample, which is a convolution" in error
    assert error.count("\n") == 1


def test_check_loads_neither_torch_nor_megatron(stage: Path):
    program = (
        "import sys; from megatron_glmv.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'megatron', 'transformers', 'nvidia', 'numpy'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "check", str(stage)], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_bad_configuration_is_one_line_and_code_2(stage: Path):
    done = glmv("check", str(stage), "optimizer.lrr=1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"glmv: error: {stage}: optimizer.lrr: unknown key; `glmv check --schema` lists the keys there are\n"


@pytest.mark.parametrize("command", ["check", "train"])
def test_impossible_layout_ends_with_code_2(stage: Path, command: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main([command, str(stage), "parallel.tensor=8"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("glmv: error: parallel.tensor: 12 ViT attention heads")
    assert error.count("\n") == 1


def test_no_file_and_unknown_commands_are_usage_errors(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["check", "steps=3"]) == 2
    assert "no configuration file given" in capsys.readouterr().err
    for arguments in ([], ["fly"], ["train"], ["export", "a"], ["check", "a.yaml", "--fast"], ["export", "a", "b", "c"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2


def test_too_few_ranks_prints_the_torchrun_command(stage: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", str(stage), "parallel.pipeline=4"]) == 2
    error = capsys.readouterr().err
    command = f"torchrun --standalone --nproc-per-node 8 -m megatron_glmv train {stage} parallel.pipeline=4\n"
    assert error.endswith(command)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("environment", "arguments", "part"),
    [
        ({"WORLD_SIZE": "3"}, [], "3 ranks are not a multiple"),
        ({"WORLD_SIZE": "10"}, [], "cannot be dealt to 5 data-parallel ranks"),
        ({"WORLD_SIZE": "4"}, ["--ranks", "2"], "torchrun has already started 4 ranks"),
        ({}, ["--ranks", "0"], "not a number of ranks"),
        ({}, ["--ranks", "6", "global_batch_rows=8"], "cannot be dealt to 3"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_before_anything_starts(
    stage: Path,
    environment: dict[str, str],
    arguments: list[str],
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", str(stage), *arguments]) == 2
    assert part in capsys.readouterr().err


def test_under_torchrun_only_the_first_rank_of_a_node_speaks(stage: Path):
    done = glmv("train", str(stage), "steps=0", WORLD_SIZE="2", RANK="1", LOCAL_RANK="1")
    assert (done.returncode, done.stderr) == (2, "")


def test_units_of_counts():
    assert [short(n) for n in (999, 1_258_291_200, 1_509_949_440_000, 33_554_432, 503_316_480_000)] == [
        "999",
        "1.26 B",
        "1.51 T",
        "33.6 M",
        "503 B",
    ]


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("checkpoint.every_steps=200000", "checkpoint.every_steps: longer than the run"),
        ("optimizer.min_lr=1", "optimizer.min_lr: larger than lr"),
        ("model.freeze=[vision]", "model.freeze: the frozen parts start from random weights"),
        ("parallel.tensor=4", "parallel.tensor: 4 ranks share 2 key/value heads"),
        ("megatron.attention_dropout=0.1", "megatron: attention_dropout cannot be checked here"),
        ("checkpoint.start_from=nowhere", "checkpoint.start_from: nowhere is not here"),
    ],
)
def test_what_deserves_a_second_look_is_said(stage: Path, override: str, part: str):
    usual = set(warnings(load(TrainConfig, [stage])))
    new = set(warnings(load(TrainConfig, [stage], [override]))) - usual
    assert len(new) == 1
    assert part in new.pop()


def test_frozen_parts_are_marked(stage: Path):
    text = summarize(load(TrainConfig, [stage], ["model.freeze=[text]"]))
    assert [line.split()[0] for line in text.splitlines() if line.endswith("frozen")] == ["text", "head"]


RL = """
run_folder: runs/rl
steps: 3
model: {preset: glm-4.1v-9b}
prompts: {sources: [{path: nowhere.jsonl}]}
repack: {row_length: 20480}
"""


@pytest.fixture
def rl_stage(tmp_path: Path) -> Path:
    path = tmp_path / "rl.yaml"
    path.write_text(RL, encoding="utf-8")
    return path


def test_check_knows_a_stage_of_reinforcement_learning(rl_stage: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["check", str(rl_stage)]) == 0
    output = capsys.readouterr().out
    assert "# iteration     128 prompts x 8 answers = 1,024 answers of at most 16,384 tokens; 1 update\n" in output
    assert "prompts.sources: nowhere.jsonl is not here" in output
    assert "model: reinforcement learning from random weights" in output


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["repack.row_length=16384"], "repack.row_length: 16384 tokens hold no prompt beside an answer of 16384"),
        (["sampling.group_size=1"], "sampling.group_size: Input should be greater than or equal to 2"),
        (["sampling.speed=1"], "sampling.speed: unknown key; `glmv rl --schema` lists the keys there are"),
        (["evaluation.every_steps=1"], "evaluation.every_steps: needs prompts.eval_sources"),
        (["parallel.context=2", "repack.row_length=20482"], "repack.row_length: 20482 is not a multiple of 4"),
        (["parallel.tensor=2"], "torchrun --standalone --nproc-per-node 2 -m megatron_glmv rl "),
    ],
)
def test_a_stage_of_reinforcement_learning_that_cannot_run_is_refused(
    rl_stage: Path, arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["rl", str(rl_stage), *arguments]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1


def test_a_file_of_another_command_is_refused(rl_stage: Path, stage: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", str(rl_stage)]) == 2
    assert "has prompts; it is a file for glmv rl" in capsys.readouterr().err
    assert cli.main(["rl", str(stage)]) == 2
    assert "has no prompts; it is a file for glmv train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layout", "given", "queues"),
    [
        ("parallel.tensor=2", None, "1"),
        ("parallel.tensor=1 parallel.context=2", None, "1"),
        ("parallel.tensor=1 parallel.pipeline=2", None, None),
        ("parallel.tensor=2", "8", "8"),
    ],
)
def test_one_cuda_queue_where_the_order_of_launches_hides_traffic(
    layout: str, given: str | None, queues: str | None, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is set before the module that loads torch is imported, and what the user has set stays."""
    name, found = "CUDA_DEVICE_MAX_CONNECTIONS", []

    def run(config: TrainConfig) -> int:
        found.append(os.environ.get(name))
        return 0

    monkeypatch.setitem(sys.modules, "megatron_glmv.training.command", SimpleNamespace(run=run))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    assert cli.main(["train", str(stage), *layout.split()]) == 0
    assert found == [queues]
