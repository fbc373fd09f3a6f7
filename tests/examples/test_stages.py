"""Every example YAML loads and is a possible run; the paper's stages have the paper's values."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_glmv.config.base import load
from megatron_glmv.config.rl_stage import RlConfig
from megatron_glmv.config.summary import data_parallel_sizes
from megatron_glmv.config.training import TrainConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
ALL = sorted(EXAMPLES.glob("*.yaml"))
STAGES = [path for path in ALL if not path.stem.startswith("rl")]


def stage(name: str) -> TrainConfig:
    config = load(TrainConfig, [EXAMPLES / f"{name}.yaml"])
    config.check()
    return config


def rl_stage(name: str) -> RlConfig:
    config = load(RlConfig, [EXAMPLES / f"{name}.yaml"])
    config.check()
    return config


def test_the_stages_of_the_readme_are_there():
    assert {path.stem for path in STAGES} >= {"quickstart", "pretrain", "long_context", "sft"}


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_example_is_a_possible_run(path: Path):
    assert data_parallel_sizes(stage(path.stem))[0] == 1


@pytest.mark.parametrize("path", sorted(set(ALL) - set(STAGES)), ids=lambda path: path.stem)
def test_example_of_reinforcement_learning_is_a_possible_run(path: Path):
    config = rl_stage(path.stem)
    assert config.data_parallel(config.parallel.model_ranks) == 1


def test_reinforcement_learning_has_the_values_of_the_paper():
    """Section 5 of arXiv 2507.01006."""
    config = rl_stage("rl")
    assert (config.sampling.top_p, config.repack.row_length) == (1.0, 32_768)
    assert (config.algorithm.kl_coefficient, config.algorithm.entropy_coefficient) == (0.0, 0.0)
    assert config.algorithm.clip_high > config.algorithm.clip_low
    assert config.curriculum.enabled and config.expansion.enabled and config.force_answer.enabled
    assert config.checkpoint.start_from == stage("sft").run_folder


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_example_opens_with_what_it_needs_and_gives(path: Path):
    text = path.read_text(encoding="utf-8")
    head = text[: text.index("\nrun_folder")]
    assert all(line.startswith("#") for line in head.splitlines())
    for word in ("# What:", "# Hardware:", "# Command:", "# Expected:"):
        assert word in head


@pytest.mark.parametrize(
    ("name", "steps", "rows", "length", "tensor", "context"),
    [("pretrain", 120_000, 1536, 8192, 2, 1), ("long_context", 10_000, 1536, 32_768, 2, 4), ("sft", 2000, 32, 32_768, 2, 4)],
)
def test_values_of_the_paper(name: str, steps: int, rows: int, length: int, tensor: int, context: int):
    """Sections 3 and 4 of arXiv 2507.01006; the steps, tensor and context of sft are ours."""
    config = stage(name)
    assert (config.steps, config.global_batch_rows, config.data.sequence_length) == (steps, rows, length)
    assert (config.parallel.tensor, config.parallel.context, config.model.preset) == (tensor, context, "glm-4.1v-9b")


def test_each_stage_starts_from_the_one_before():
    assert stage("long_context").checkpoint.start_from == stage("pretrain").run_folder
    assert stage("sft").checkpoint.start_from == stage("long_context").run_folder


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.preset=null", "model.load_weights=false", "model.hf_folder=."],
        ["parallel.pipeline=4", "parallel.virtual_pipeline=2"],
        ["precision.fp8_text=current"],
    ],
)
def test_variations_named_in_pretrain_load(overrides: list[str]):
    load(TrainConfig, [EXAMPLES / "pretrain.yaml"], overrides)
