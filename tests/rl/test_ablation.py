"""The ablation runner: numbers of its table from curves made by hand, what it runs again, and the files it starts runs with."""

from __future__ import annotations

import json

import pytest
import rl_ablation
import rl_ablation_table
import yaml

from megatron_glmv.config.base import ConfigError, load, validate
from megatron_glmv.config.rl_stage import RlConfig

GROUP = 4
TREE = {
    "steps": 4,
    "model": {"preset": "digits"},
    "sampling": {"prompts_per_step": 10, "group_size": GROUP, "max_tokens": 16},
    "force_answer": {"enabled": False},
    "repack": {"row_length": 512},
    "curriculum": {"domains": {"ocr": 2.0, "counting": 1.0}},
    "algorithm": {"clip_low": 0.1},
    "evaluation": {"prompts": 8},
}


@pytest.fixture
def file(tmp_path):
    """A configuration with prompts of two domains, one of them named by the source only."""
    item = {"type": "image", "image": "pictures/a.png"}
    lines = [
        {"id": "a", "messages": [{"role": "user", "content": [item, {"type": "text", "text": "Read."}]}], "answer": "1"},
        {"id": "b", "messages": [{"role": "user", "content": "How many?"}], "domain": "counting", "answer": "1"},
    ]
    prompts = tmp_path / "data" / "prompts.jsonl"
    prompts.parent.mkdir()
    prompts.write_text("not JSON\n" + "".join(json.dumps(line) + "\n" for line in lines))
    sources = [{"path": str(prompts), "domain": "ocr"}]
    path = tmp_path / "rl.yaml"
    path.write_text(yaml.safe_dump(TREE | {"prompts": {"sources": sources, "eval_sources": sources}}))
    return path


def record(folder, wave, accuracy, useful=5, filled=2, domains=("counting", "ocr")):
    """A metrics.jsonl: iterations of `wave` prompts, an evaluation before the first and after each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step, value in enumerate(accuracy):
        expansion = {"wave": wave, "unjudged": 1, "degenerate": wave - 1 - useful, "chosen": 10, "filled": filled}
        if step:
            lines.append({"step": step, "expansion": expansion, "seconds": {"total": 2.0}})
        # The mean over domains is the value itself.
        lines.append({"step": step, "eval": {"accuracy": dict(zip(domains, (value - 0.1, value + 0.1), strict=True))}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "ev')


def curve(folder, *recorded, **changes):
    record(folder, *recorded, **changes)
    return rl_ablation_table.read_curve(folder / "metrics.jsonl", GROUP)


def test_arms_are_compared_at_the_same_number_of_rollouts(tmp_path):
    plain = curve(tmp_path / "plain", 10, [0.2, 0.3, 0.4, 0.5, 0.6])  # 40 answers an iteration
    again = curve(tmp_path / "again", 10, [0.2, 0.3, 0.4, 0.5, 0.4])
    wide = curve(tmp_path / "wide", 15, [0.2, 0.5, 0.5, 0.9, 0.9], useful=7, filled=0)  # 60 answers
    result = rl_ablation_table.compare({"plain": {0: plain, 1: again}, "wide": {0: wide}}, 1000, [0.45, 0.6, 0.8])
    assert result.rollouts == 160  # where the shortest ends; the curve of the wide arm goes to 240
    one, other = result.rows["plain"], result.rows["wide"]
    assert one.accuracy.mean == pytest.approx(0.5) and one.accuracy.spread == pytest.approx(0.02**0.5)
    assert one.domains["ocr"].mean == pytest.approx(0.6)
    assert other.accuracy.mean == pytest.approx(0.5 + 0.4 * 40 / 60) and other.accuracy.spread is None
    assert other.iterations.mean == pytest.approx(160 / 60) and one.iterations.values == (4, 4)
    assert one.useful.mean == pytest.approx(5 / 9) and one.useful_trained.mean == pytest.approx(0.8)
    assert other.useful.mean == pytest.approx(7 / 14) and other.useful_trained.mean == pytest.approx(1)
    assert one.targets[0].values == (pytest.approx(100), pytest.approx(100))
    assert one.targets[1].values == (pytest.approx(160), None)
    assert other.targets[0].values == (pytest.approx(50),)
    assert other.targets[2].values == (None,)  # crossed at 165 only
    assert one.seconds.mean == pytest.approx(2)


def test_the_budget_bounds_what_is_compared_and_targets_are_chosen(tmp_path):
    low, high = curve(tmp_path / "low", 10, [0.2, 0.3, 0.4]), curve(tmp_path / "high", 10, [0.2, 0.6, 1.0 - 0.1])
    result = rl_ablation_table.compare({"low": {0: low}, "high": {0: high}}, 40)
    assert result.rollouts == 40 and result.start == pytest.approx(0.2)
    assert result.targets == (pytest.approx(0.4), pytest.approx(0.5)) and result.chosen
    falling = curve(tmp_path / "falling", 10, [0.4, 0.3])
    assert rl_ablation_table.compare({"falling": {0: falling}}, 40).targets == ()


def test_table_and_picture_are_written(tmp_path, file):
    curves = {
        "rlcs": {0: curve(tmp_path / "a", 15, [0.2, 0.5, 0.7, 0.8]), 1: curve(tmp_path / "b", 15, [0.2, 0.4, 0.6, 0.8])},
        "grpo": {0: curve(tmp_path / "c", 10, [0.2, 0.3, 0.4])},
        "dapo": {},
    }
    config = validate(RlConfig, rl_ablation.base_tree(file, []))
    result = rl_ablation_table.compare({name: found for name, found in curves.items() if found}, 160, [0.45])
    rl_ablation_table.write(result, curves, config, {"rlcs": "", "grpo": "a.b=1", "dapo": ""}, tmp_path)
    lines = (tmp_path / "ablation.md").read_text().splitlines()
    # At 80 answers: a third of the way from 60 to 120; 0.45 is crossed at 50 and 75.
    assert lines[2].startswith(
        "| rlcs | 2 | 1.3 ± 0.0 | 35.7% ± 0.0 | 80.0% ± 0.0 | 51.7% ± 7.1 | 41.7% ± 7.1 | 61.7% ± 7.1 | 62 ± 18 |"
    )
    assert lines[3] == "| grpo | 1 | 2.0 | 55.6% | 80.0% | 40.0% | 30.0% | 50.0% | not reached | 2.00 |"
    assert any("left out: dapo" in line for line in lines)
    tree = json.loads((tmp_path / "ablation.json").read_text())
    assert tree["rows"]["grpo"]["accuracy"]["values"] == [pytest.approx(0.4)]
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_only_what_is_not_done_runs_again(tmp_path, file):
    tree, out = rl_ablation.base_tree(file, []), tmp_path / "out"
    arms = [rl_ablation.parse_arm(name, 0.1) for name in ("rlcs", "grpo")]
    runs = rl_ablation.plan(tree, arms, [0, 1], out)
    assert [(run.arm, run.seed, run.budget) for run in runs] == [
        (arm, seed, 160) for seed in (0, 1) for arm in ("rlcs", "grpo")
    ]
    assert not any(run.is_done() for run in runs)
    record(out / "rlcs/seed-0", 15, [0.2, 0.3, 0.3])  # killed after 120 answers
    record(out / "rlcs/seed-1", 15, [0.2, 0.3, 0.3, 0.3])  # 180: beyond the budget
    record(out / "grpo/seed-0", 9, [0.2, 0.3, 0.3, 0.3, 0.3])  # a prompt was lost each time, but all iterations are there
    runs = rl_ablation.plan(tree, arms, [0, 1], out)
    assert [(run.arm, run.seed) for run in runs if not run.is_done()] == [("rlcs", 0), ("grpo", 1)]
    config = load(RlConfig, [out / "grpo/seed-1.yaml"])
    assert (config.seed, config.run_folder, config.checkpoint.resume) == (1, out / "grpo/seed-1", True)
    assert not config.curriculum.enabled and not config.expansion.enabled and config.evaluation.every_steps == 1
    other = rl_ablation.base_tree(file, ["optimizer.lr=0.5"])
    with pytest.raises(ConfigError, match=r"seed-0.yaml: was started with another optimizer"):
        rl_ablation.plan(other, arms, [0], out)


def test_arms_change_what_they_say(tmp_path, file):
    tree = rl_ablation.base_tree(file, [])

    def config(text):
        return validate(RlConfig, rl_ablation.arm_tree(tree, rl_ablation.parse_arm(text, 0.1), tmp_path / "out"))

    assert config("dapo").expansion.method == "waves" and not config("dapo").curriculum.enabled
    assert config("symmetric-clip").algorithm.clip_high == 0.1
    own = config("mine=curriculum.tier_bounds=[0.1,0.2,0.3,0.4],sampling.group_size=8")
    assert own.curriculum.tier_bounds == (0.1, 0.2, 0.3, 0.4) and own.sampling.group_size == 8
    alone = config("one-domain:ocr")
    assert alone.curriculum.domains == {"ocr": 2.0} and alone.prompts.eval_sources == config("rlcs").prompts.eval_sources
    (line,) = map(json.loads, alone.prompts.sources[0].path.read_text().splitlines())
    assert line["id"] == "a" and line["messages"][0]["content"][0]["image"] == str(tmp_path / "data/pictures/a.png")
    for wrong in ("one-domain:nothing", "unknown", "grpo=a.b=1", "steps=4", "mine=sampling.group_sise=8"):
        with pytest.raises(ConfigError):
            config(wrong)
