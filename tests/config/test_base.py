"""Merging, overrides and messages of configuration files."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_glmv.config.base import ConfigError, load, merge, parse_override, to_yaml, validate
from megatron_glmv.config.training import TrainConfig

BASE = """
run_folder: runs/x
steps: 100
global_batch_rows: 8
model: {preset: digits}
parallel: {tensor: 2, pipeline: 2}
data: {sequence_length: 512, sources: [{name: a, path: data/a}]}
optimizer: {lr: 0.001, warmup_steps: 10}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def message_of(base: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, [base], overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_later_files_and_then_overrides_win(base: Path, tmp_path: Path):
    over = tmp_path / "over.yaml"
    over.write_text("optimizer: {lr: 0.002}\nsteps: 200\n")
    config = load(TrainConfig, [base, over], ["steps=300", "parallel.tensor=1"])
    assert (config.steps, config.optimizer.lr, config.optimizer.warmup_steps) == (300, 0.002, 10)
    assert (config.parallel.tensor, config.parallel.pipeline) == (1, 2)
    assert load(TrainConfig, [over, base]).optimizer.lr == 0.001


def test_mappings_merge_and_lists_replace():
    assert merge({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}}) == {"a": {"b": 1, "c": [3]}}


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("a.b=1", {"a": {"b": 1}}),
        ("a=null", {"a": None}),
        ("a=", {"a": None}),
        ("a.b=[x, y]", {"a": {"b": ["x", "y"]}}),
        ("a=b=c", {"a": "b=c"}),
        ("lr=1.0e-3", {"lr": 0.001}),
    ],
)
def test_override_values_are_yaml(text: str, tree: dict[str, object]):
    assert parse_override(text) == tree


@pytest.mark.parametrize("text", ["steps", "=3", "a..b=1", "a=[1", ".a=1"])
def test_malformed_overrides_are_named(base: Path, text: str):
    assert repr(text) in message_of(base, text)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimiser.lr=1", "optimiser: unknown key"),
        ("optimizer.lrr=1", "optimizer.lrr: unknown key"),
        ("data.sources=[{name: a, path: b, wieght: 1}]", "data.sources.0.wieght: unknown key"),
        ("steps=0", "steps: "),
        ("steps=many", "steps: "),
        ("optimizer.beta1=1.5", "optimizer.beta1: "),
        ("optimizer.schedule=exponential", "optimizer.schedule: "),
        ("optimizer.warmup_steps=101", "optimizer.warmup_steps: longer than the run"),
        ("evaluation.every_steps=5", "evaluation.every_steps: needs data.eval_sources"),
        ("data.sources=[]", "data.sources: "),
        ("data.sources=[{name: a, path: b}, {name: a, path: c}]", "data.sources: two sources have the same name"),
        ("model.hf_folder=somewhere", "model: give exactly one of preset and hf_folder"),
        ("model.freeze=[vision, merger, text]", "model.freeze: every part is frozen"),
        ("precision={layers: torch, fp8_text: current}", "precision: fp8_text / fp8_vision: FP8 needs Transformer Engine"),
        ("precision={dtype: fp32, fp8_vision: block}", "precision: fp8_text / fp8_vision: FP8 needs dtype bf16"),
    ],
)
def test_faults_name_file_and_key(base: Path, override: str, key: str):
    assert message_of(base, override).startswith(f"{base}: {key}")


def test_a_missing_key_is_named(tmp_path: Path):
    path = tmp_path / "empty.yaml"
    path.write_text("steps: 3\n")
    with pytest.raises(ConfigError, match="run_folder: Field required"):
        load(TrainConfig, [path])


@pytest.mark.parametrize(("text", "part"), [("a: [1", "not a YAML file"), ("- 1\n", "must be a mapping")])
def test_files_that_are_not_trees(tmp_path: Path, text: str, part: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=part) as caught:
        load(TrainConfig, [path])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"^nowhere\.yaml: no such configuration file"):
        load(TrainConfig, ["nowhere.yaml"])


def test_the_resolved_tree_reads_back_equal(base: Path):
    config = load(TrainConfig, [base])
    assert validate(TrainConfig, yaml.safe_load(to_yaml(config))) == config
