"""The plan as a whole: the command line, what its numbers must do when the configuration changes, and the search."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_glmv.cli import main
from megatron_glmv.config.base import ConfigError, load
from megatron_glmv.config.rl_stage import RlConfig
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.data.index import COLUMNS, PackedIndex, ShardEntry, write_index
from megatron_glmv.plan.activations import most_going_on
from megatron_glmv.plan.devices import find_hardware
from megatron_glmv.plan.estimate import Plan, estimate
from megatron_glmv.plan.flops import forward_flops, training_flops
from megatron_glmv.plan.rows import PROMPT_TOKENS, RowAssumptions, RowSample, sample_rows
from megatron_glmv.plan.search import override_line, search, wanted_layers
from megatron_glmv.plan.timing import StageTimes

EXAMPLES = Path(__file__).parents[2] / "examples"
H100 = find_hardware("h100")


def stage(*overrides: str) -> TrainConfig:
    return load(TrainConfig, [EXAMPLES / "pretrain.yaml"], overrides)


def rows_of(config: TrainConfig, images: float = 8.0, trained: float = 1.0) -> RowSample:
    return sample_rows(config, RowAssumptions(images_per_row=images, trained_share=trained))


def plan(*overrides: str, gpus: int = 512, images: float = 8.0, trained: float = 1.0, **options: Any) -> Plan:
    config = stage(*overrides)
    return estimate(config, gpus, H100, rows_of(config, images, trained), **options)


def test_the_9b_in_the_layout_of_the_paper() -> None:
    """Bounds by hand: 10.29e9 / 2 weights of 2 bytes, gradients of 4; no plan beats the assumed share of the peak."""
    found = plan()
    state = found.stages[0].state
    assert 10.2e9 < state.weights < 10.4e9
    assert state.gradients == 2 * state.weights
    assert state.optimizer == pytest.approx(12 * 10.29e9 / 2 / 256, rel=0.01)
    assert found.fits
    assert 0.3 < found.mfu < H100.matmul_efficiency
    work = training_flops(found.config.model.shape, [1024] * 8, [(32, 32)] * 8)
    assert found.mfu == pytest.approx(work.total * 1536 / (found.step_s * 512 * 989.4e12))


def test_more_gpus_share_the_optimizer_and_the_rows() -> None:
    few, many = plan(gpus=64), plan(gpus=512)
    assert few.stages[0].state.optimizer > 7.5 * many.stages[0].state.optimizer
    assert 7.5 < few.step_s / many.step_s <= 8.0


def test_recomputation_trades_time_for_memory() -> None:
    none, vision, both = plan(), plan("recompute.vision=full"), plan("recompute.vision=full", "recompute.text=full")
    assert none.memory > vision.memory > both.memory
    assert none.step_s < vision.step_s < both.step_s
    # The decoder's forward pass once more: at most a third, and at least a quarter of its work.
    assert 1.2 < both.step_s / none.step_s < 4 / 3 + 0.01


def test_pictures_slow_the_first_stage_alone_and_fewer_layers_there_even_it_out() -> None:
    """A merged token costs the tower about 14 decoder layers: where every token is visual, 54 layers' work on 4 stages."""
    even = ["parallel.pipeline=4"]
    text, pictures = plan(*even, images=0), plan(*even, images=32)
    assert pictures.timeline.busy[1:] == text.timeline.busy[1:]
    assert pictures.timeline.busy[0] > 2 * text.timeline.busy[0]
    shifted = plan(*even, "parallel.first_stage_layers=1", images=32)
    assert shifted.step_s < 0.75 * pictures.step_s
    shape = stage().model.shape
    layer = forward_flops(shape, [1], []).text_linear / 40
    assert 13 < forward_flops(shape, [], [(32, 32)]).vision / 256 / layer < 16


def test_untrained_tokens_spare_the_last_stage_alone_and_layers_move_there() -> None:
    """By hand: 10 layers of 204 M weights and a head of 621 M; four fifths of the head and of an MLP of 168 M are 24 %."""
    deep = ["parallel.tensor=1", "parallel.pipeline=4"]
    every, fifth = plan(*deep), plan(*deep, trained=0.2)
    assert fifth.timeline.busy[:3] == every.timeline.busy[:3]
    assert fifth.timeline.busy[3] < 0.8 * every.timeline.busy[3]
    # Next to none: the last of 10 layers is its attention and a sixth of its weights, and the head the traffic of its gradient.
    assert 0.9 < plan(*deep, trained=0.001).timeline.busy[3] / every.timeline.busy[1] < 0.96
    assert fifth.stages[:3] == every.stages[:3]
    assert fifth.stages[3].activations < every.stages[3].activations
    assert fifth.stages[3].logits == pytest.approx(0.2 * every.stages[3].logits, rel=0.01)
    cut = {"tensor": 1, "context": 1, "pipeline": 2, "vision": "tensor"}
    config = stage()
    wanted = [wanted_layers(config, cut, H100, rows_of(config, images=0, trained=share)) for share in (1.0, 0.5, 0.01)]
    assert wanted[0] > wanted[1] > wanted[2] == 20
    # The head's products are 3.0 layers', which spend time beside theirs, too; each layer that moves makes up for two.
    assert 21 < wanted[0] < 21.6


def test_operations_and_traffic_count_trained_tokens() -> None:
    found, every = plan(trained=0.25), plan()
    work = training_flops(found.config.model.shape, [1024] * 8, [(32, 32)] * 8, trained=2048)
    assert found.mfu == pytest.approx(work.total * 1536 / (found.step_s * 512 * 989.4e12))
    # Two of a layer's four collectives see a quarter of the tokens, in one of 40 layers.
    pictures = plan(images=8).traffic.tensor - plan(images=0).traffic.tensor
    layers = every.traffic.tensor - pictures
    assert found.traffic.tensor == pytest.approx(pictures + layers * (1 - 0.75 / 2 / 40))


def test_adapters_and_frozen_decoders_are_planned_by_trained_tokens_too() -> None:
    lora = load(TrainConfig, [EXAMPLES / "lora.yaml"])
    every, some = (estimate(lora, 8, H100, rows_of(lora, trained=share)) for share in (1.0, 0.1))
    length, shape = lora.sequence_length, lora.model.shape
    spared = length - round(0.1 * length)
    whole, less = (training_flops(shape, [length], [], (), lora.model.lora, trained) for trained in (None, length - spared))
    assert every.row_flops - some.row_flops == pytest.approx(whole.total - less.total, rel=1e-3)
    assert some.step_s < every.step_s
    # Layers are reckoned as alike: what the last one is spared may be more than the mean backward pass of all.
    alone = load(
        TrainConfig, [EXAMPLES / "lora.yaml"], ["model.lora.targets=['layers.39.mlp.gate_up_proj']", "recompute.text=none"]
    )
    last = StageTimes(alone, H100, rows_of(alone, trained=0.1)).last
    assert last.backward.constant >= 0
    frozen = ["model.freeze=[text]"]
    assert plan(*frozen, trained=0.1).step_s < plan(*frozen).step_s


def test_memory_has_room_for_trained_tokens_that_all_lie_with_one_rank() -> None:
    """8,192 tokens: of 2,048 trained ones, 8 tensor ranks of 1,024 may all have to take as many as the one that has most."""
    config = stage("parallel.tensor=4")
    assert most_going_on(config, 2048) == 8192
    assert most_going_on(config, 1000) == 4 * 1008
    assert most_going_on(stage("parallel.tensor=4", "parallel.sequence=false"), 1000) == 1008
    assert most_going_on(stage("parallel.tensor=1", "parallel.context=4"), 3000) == 2048
    assert most_going_on(stage("parallel.tensor=1", "precision.fp8_text=block"), 0) == 16
    assert most_going_on(stage("parallel.tensor=2", "precision.fp8_text=block"), 129) == 2 * 256
    uneven = RowSample(
        tokens=np.full(2, 8192.0), patches=np.zeros(2), trained=np.array([1024.0, 3072.0]), document_tokens=1024.0,
        frame_patches=1.0, origin="made up",
    )  # fmt: skip
    worst, mean = plan(images=0, trained=3 / 8), plan(images=0, trained=1 / 4)
    found = estimate(stage(), 512, H100, uneven)
    assert found.stages[0].logits == worst.stages[0].logits > mean.stages[0].logits
    assert found.timeline == mean.timeline


def test_frozen_parts_and_adapters_need_no_state() -> None:
    whole, frozen = plan(), plan("model.freeze=[vision, merger]")
    assert frozen.stages[0].state.gradients < whole.stages[0].state.gradients
    assert frozen.stages[0].activations < whole.stages[0].activations
    lora = load(TrainConfig, [EXAMPLES / "lora.yaml"])
    adapted = estimate(lora, 8, H100, rows_of(lora))
    assert adapted.stages[0].state.gradients < 0.02 * whole.stages[0].state.gradients


def test_context_ranks_share_tokens_but_each_runs_the_whole_tower() -> None:
    one = plan("parallel.context=1", "data.sequence_length=32768", images=32)
    four = plan("parallel.context=4", "data.sequence_length=32768", images=32)
    assert four.timeline.busy[0] > one.timeline.busy[0] / 4 * 1.3
    assert four.traffic.context > 0 == one.traffic.context


def test_frames_dealt_to_ranks_need_a_whole_tower_and_spare_its_repetition() -> None:
    long = ["parallel.context=4", "data.sequence_length=32768"]
    shared, dealt = plan(*long, images=32), plan(*long, "parallel.vision=images", images=32)
    assert dealt.stages[0].state.weights > shared.stages[0].state.weights
    assert dealt.stages[0].activations < shared.stages[0].activations
    assert dealt.step_s < 0.9 * shared.step_s


def test_transformer_engine_keeps_the_gradient_of_the_logits_in_their_place() -> None:
    logits = 8192 * 151552 / 2
    found = {kind: plan(f"precision.layers={kind}").stages[-1].logits for kind in ("te", "torch")}
    assert found["te"] == pytest.approx(2 * logits, rel=0.1)
    assert found["torch"] == pytest.approx(6 * logits, rel=0.1)


def test_entropies_that_are_reported_need_the_distributions_of_a_block() -> None:
    rl, alike = load(RlConfig, [EXAMPLES / "rl.yaml"], []), load(TrainConfig, [EXAMPLES / "long_context.yaml"], [])
    assert (rl.parallel.tensor, rl.sequence_length) == (alike.parallel.tensor, alike.sequence_length) == (2, 32768)
    rows = rows_of(alike, trained=0.5)
    policy, plain = (estimate(config, 64, H100, rows).stages[-1].logits for config in (rl, alike))
    assert policy - plain == pytest.approx(3 * 4 * 1024 * 151552 / 2)


def test_fp8_copies_are_counted_where_they_are_made() -> None:
    assert plan().stages[0].fp8 == 0
    text, both = plan("precision.fp8_text=current"), plan("precision.fp8_text=current", "precision.fp8_vision=current")
    assert 0 < text.stages[0].fp8 < both.stages[0].fp8
    assert text.step_s < plan().step_s


@pytest.mark.parametrize("gpus", [1, 2, 96, 3072, 10_000])
def test_works_for_any_number_of_gpus(gpus: int) -> None:
    config = stage("parallel.tensor=1") if gpus == 1 else stage(f"global_batch_rows={gpus}")
    assert estimate(config, gpus, H100, rows_of(config)).step_s > 0


def test_rows_of_different_density_make_replicas_wait() -> None:
    config = stage("parallel.pipeline=2")
    patches = np.where(np.arange(1000) % 10 == 0, 40960.0, 4096.0)
    every = np.full(1000, 8192.0)
    mixed = RowSample(every, patches, every, 1024.0, 1024.0, "made up")
    alike = RowSample(every[:1], np.full(1, patches.mean()), every[:1], 1024.0, 1024.0, "made up")
    uneven, even = (estimate(config, 512, H100, rows) for rows in (mixed, alike))
    assert even.skew == 1.0
    in_turn = estimate(stage("parallel.pipeline=2", "data.even_ranks=false"), 512, H100, mixed)
    assert in_turn.skew > uneven.skew + 0.05 > 1.05
    assert uneven.stages[0].activations > even.stages[0].activations


def write_table(folder: Path, patches: list[int], tokens: int = 8000, trained: int = 1000) -> None:
    """A data set's index and row tables; nothing else is read for a plan."""
    folder.mkdir()
    shards = []
    for number, part in enumerate((patches[: len(patches) // 2], patches[len(patches) // 2 :])):
        table = np.zeros((len(part), len(COLUMNS)), np.int64)
        table[:, COLUMNS.index("tokens")], table[:, COLUMNS.index("patches")] = tokens, part
        table[:, COLUMNS.index("trained")] = trained
        table[:, COLUMNS.index("squared_tokens")] = 4 * (tokens // 4) ** 2
        table[:, COLUMNS.index("squared_patches")] = np.array(part) * 500
        np.save(folder / f"s{number}.rows.npy", table)
        shards.append(ShardEntry(file=f"s{number}.tar", rows=len(part), size_bytes=1, index=f"s{number}.rows.npy"))
    limits = {"min_pixels": 1, "max_pixels": 2}
    write_index(
        folder,
        PackedIndex.model_validate(
            {"length": 8192, "align": 8, "num_rows": len(patches), "num_samples": 4 * len(patches),
             "num_tokens": tokens * len(patches), "vocab_size": 151552, "tokens": {"image": 1, "pad": 2},
             "image_limits": limits, "shards": shards}
        ),
    )  # fmt: skip


def test_rows_are_measured_where_data_is_on_disk(tmp_path: Path) -> None:
    write_table(tmp_path / "a", [1000] * 60)
    write_table(tmp_path / "b", [5000] * 60, tokens=6000, trained=2000)
    rows = sample_rows(stage(), RowAssumptions(), [tmp_path / "a", tmp_path / "b"])
    assert rows.mean_patches == 3000
    assert rows.mean_tokens == 7000
    assert rows.document_tokens == pytest.approx((8000**2 + 6000**2) / 4 / 14000)
    assert rows.frame_patches == 500
    assert rows.max_patches == 5000
    assert (rows.mean_trained, rows.max_trained) == (1500, 2000)
    assert rows.origin.startswith("measured")
    source = f"data.sources=[{{name: a, path: {tmp_path / 'a'}, weight: 3}}, {{name: b, path: {tmp_path / 'b'}, weight: 1}}]"
    weighed = sample_rows(stage(source), RowAssumptions())
    assert weighed.mean_patches == 2000
    assert weighed.mean_trained == 1250
    said = sample_rows(stage(source), RowAssumptions(trained_share=0.5))
    assert (said.mean_trained, said.max_trained) == (3750, 4000)
    assert said.origin.endswith("assumed: 50% of the tokens trained (--trained-share)")
    assert sample_rows(stage(source), RowAssumptions(images_per_row=2)).origin.startswith("assumed")


def test_without_data_all_tokens_count_as_trained_and_of_answers_what_their_prompts_leave() -> None:
    config = stage()
    assert sample_rows(config, RowAssumptions()).mean_trained == config.sequence_length
    assert "100% of them trained" in sample_rows(config, RowAssumptions()).origin
    answers = load(RlConfig, [EXAMPLES / "rl.yaml"])
    half = sample_rows(answers, RowAssumptions(), answer_tokens=PROMPT_TOKENS)
    assert half.mean_trained == answers.sequence_length / 2
    longer = sample_rows(answers, RowAssumptions()).mean_trained / answers.sequence_length
    assert longer == answers.max_answer_tokens / (answers.max_answer_tokens + 2 * PROMPT_TOKENS)
    assert sample_rows(answers, RowAssumptions(trained_share=0.25)).mean_trained == answers.sequence_length / 4


def test_search_finds_layouts_that_fit_and_says_how_to_get_them() -> None:
    config = stage("parallel.pipeline=8", "global_batch_rows=128")
    found = search(config, 64, H100, rows_of(config), keep=3)
    current = estimate(config, 64, H100, rows_of(config))
    assert len(found.best) == 3
    assert all(best.fits and best.gpus == 64 for best in found.best)
    assert found.best[0].step_s < current.step_s
    assert [best.step_s for best in found.best] == sorted(best.step_s for best in found.best)
    line = override_line(config, found.best[0].config)
    again = load(TrainConfig, [EXAMPLES / "pretrain.yaml"], ["parallel.pipeline=8", "global_batch_rows=128", *line.split()])
    assert again.parallel == found.best[0].config.parallel
    assert again.recompute == found.best[0].config.recompute


def test_command_line_plans_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.json"
    code = main(["plan", str(EXAMPLES / "pretrain.yaml"), "--gpus", "64", "--layouts", "1", "--json", str(target), "steps=5000",
                 "global_batch_rows=64", "--trained-share", "0.25"])  # fmt: skip
    assert code == 0
    out = capsys.readouterr().out
    assert "MFU" in out
    assert "assumed: full rows" in out
    assert "documents of 1024 tokens, 25% of them trained" in out
    assert "8,192 useful tokens a row, 2,048 of them trained (at most 2,048)" in out
    tree = json.loads(target.read_text())
    assert tree["plan"]["gpus"] == 64
    assert tree["plan"]["fits"]
    assert len(tree["layouts"]) == 1
    assert tree["plan"]["memory_bytes"] == max(stage["total"] for stage in tree["plan"]["stages"])


def test_what_does_not_fit_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(EXAMPLES / "pretrain.yaml"), "--gpus", "8", "--layouts", "0", "--memory-gb", "60"]
    assert main(arguments) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("glmv: error: does not fit: a rank needs")
    assert "\n" not in line
    change = line.rpartition("the smallest change that fits: ")[2].rpartition(" (")[0].split()
    assert len(change) >= 1
    assert main([*arguments, *change]) == 0


def test_memory_of_the_nodes_at_a_save_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Every rank gathers the state of all its replicas: 12 bytes of each of 10.3 billion parameters, on 8 ranks of tensor 2."""
    arguments = ["plan", str(EXAMPLES / "pretrain.yaml"), "--layouts", "0", "parallel.tensor=2", "parallel.vision=tensor"]
    for gpus in (64, 512):
        assert main([*arguments, "--gpus", str(gpus)]) == 0
        assert "host        496 GB of a node's own memory at a save" in capsys.readouterr().out
    main([*arguments, "--gpus", "64", "parallel.distributed_optimizer=false"])
    assert "host " not in capsys.readouterr().out


def test_without_gpus_the_fewest_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(EXAMPLES / "pretrain.yaml"), "--layouts", "0"])
    first = int(capsys.readouterr().out.split()[1])
    fewer = [size for size in range(2, first, 2) if 1536 % (size // 2) == 0]
    assert plan(gpus=first).fits
    assert not any(plan(gpus=size).fits for size in fewer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "b9"], "--gpu: 'b9' is not known; there are a100, h100, h200"),
        (["--gpus", "10000"], "--gpus 3,072 can be used"),
        (["--gpus", "0"], "--gpus: 0 is too small"),
        (["--trained-share", "20"], "--trained-share: 20 is no share of the tokens; give a number above 0, at most 1"),
        (["--gpus", "8", "--data", "nowhere"], "nowhere/index.json: no such file"),
    ],
)
def test_faults_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(EXAMPLES / "pretrain.yaml"), "--layouts", "0", *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_hardware_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nmatmul_efficiency: 0.34\nnetwork_gbs: 25\n")
    mine = find_hardware("h100", file, memory_gb=40)
    assert (mine.memory_gb, mine.network_gbs, mine.link_gbs) == (40, 25, H100.link_gbs)
    config = stage()
    assert estimate(config, 512, mine, rows_of(config)).step_s > 1.5 * plan().step_s
    file.write_text("matmul: 1")
    with pytest.raises(ConfigError, match=r"mine\.yaml: matmul: unknown key"):
        find_hardware("h100", file)


def test_every_example_can_be_planned_without_torch() -> None:
    code = (
        "import sys\nfrom megatron_glmv.cli import main\n"
        "for name in sys.argv[1:]:\n    main(['plan', name, '--gpus', '512', '--layouts', '0'])\n"
        "assert 'torch' not in sys.modules and 'megatron.core' not in sys.modules\n"
    )
    names = [str(EXAMPLES / f"{name}.yaml") for name in ("pretrain", "long_context", "rl")]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("MFU") == 3
