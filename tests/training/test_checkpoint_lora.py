"""Training adapters: saved in one layout and continued in others with the same losses, on weights that stay as they were.

The gate is the layouts' own (tests/model/test_layouts.py): only the order of fp32 sums differs, here over three updates.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.model import adapters, oracle
from tests.ranks import leave_layout, run_ranks
from tests.training.test_checkpoint_glm import STEPS, update

SAVED: dict[str, Any] = {"tensor": 2, "pipeline": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "tensor 4": {"tensor": 4},
    "pipeline 2 x virtual 2 x data 2": {"pipeline": 2, "virtual_pipeline": 2},
}
KINDS: dict[str, dict[str, Any]] = {
    "some of every kind": {"targets": (*adapters.SOME, "merger.proj", "layers.0.*.o_proj", "lm_head")},
    "only vision": {"targets": ("visual.blocks.*",)},
}
Report = dict[str, dict[str, Any]]


def train_in_layouts(rank: int, architecture: str) -> Report:
    """For each kind: losses of an unbroken run after its save, and of runs that resumed from it in other layouts."""
    from megatron_glmv.parallel import groups

    report: Report = {name: {} for name in KINDS} | {"errors": {}}
    for layout_name, layout in {"unbroken": SAVED, **OTHERS}.items():
        groups.initialize(config_of(architecture, "base", layout).parallel, seed=1)
        if layout_name == "unbroken":
            save_base(architecture, layout)
            report["errors"]["changed"] = []
        for name, kind in KINDS.items():
            config = config_of(architecture, name, layout, **kind)
            report[name][layout_name], changed = run(config, saves=layout_name == "unbroken")
            report["errors"]["changed"] += changed
            if layout_name == "tensor 4":
                report[name]["live"] = live_and_merged(config)
        if layout_name == "tensor 4":
            report["errors"] |= refused(architecture, layout)
        leave_layout()
    return report


def config_of(architecture: str, name: str, layout: dict[str, Any], **kind: Any) -> Any:
    from megatron_glmv.config.training import TrainConfig

    tree = adapters.lora_config(architecture, layout | {"distributed_optimizer": True}, {}, **kind).model_dump()
    if not kind:
        tree["model"]["lora"] = None
    tree |= {"run_folder": Path(architecture) / "runs" / name, "steps": 20}
    tree["optimizer"] |= {"lr": 1e-2, "vision_lr": 3e-3, "merger_lr": 2e-2, "warmup_steps": 4}
    tree["checkpoint"]["start_from"] = None if name == "base" else Path(architecture) / "runs" / "base"
    return TrainConfig.model_validate(tree)


def save_base(architecture: str, layout: dict[str, Any]) -> None:
    """A run without adapters that others start from."""
    from megatron_glmv.training.assemble import assemble, assemble_model
    from megatron_glmv.training.checkpoint import Checkpointer
    from megatron_glmv.training.state import TrainState

    config = config_of(architecture, "base", layout)
    assembly = assemble(config, assemble_model(config))
    Checkpointer(config, assembly.chunks, assembly.optimizer).save(TrainState(step=1))


def run(config: Any, *, saves: bool) -> tuple[list[float], list[str]]:
    """Either start, two steps, a save and STEPS more, or STEPS from that save.

    Returns:
        The losses of the last STEPS, and the names of the weights that are not bit for bit those of the base.
    """
    from megatron_glmv.convert.parameters import local_parameters
    from megatron_glmv.training.assemble import assemble, assemble_model
    from megatron_glmv.training.checkpoint import Checkpointer
    from megatron_glmv.training.state import TrainState

    # Another seed than the saved run's: weights and adapters must come from the checkpoint.
    seeded = config.model_copy(update={"seed": 1 if saves else 2})
    models = assemble_model(seeded)
    assembly = assemble(seeded, models)
    checkpointer = Checkpointer(config, assembly.chunks, assembly.optimizer)
    if saves:
        checkpointer.load_weights_only(config.checkpoint.start_from)
        for step in range(2):
            update(assembly, step)
        checkpointer.save(TrainState(step=2))
    else:
        assert checkpointer.load_latest() == TrainState(step=2)
    losses = [update(assembly, step) for step in range(2, 2 + STEPS)]
    base = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
    first = local_parameters(assemble_model(base))
    return losses, [name for name, weight in local_parameters(models).items() if not weight.equal(first[name])]


def live_and_merged(config: Any) -> tuple[int, float, int] | None:
    """On rank 0: the live model's merged weights against those read from the checkpoint it resumed from.

    Returns:
        How many there are, their worst difference, and how many differ from the base's.
    """
    import torch

    from megatron_glmv.config.weight_map import entries
    from megatron_glmv.convert.checkpoint_tensors import CheckpointTensors
    from megatron_glmv.convert.hf_export import gather_hf_tensors
    from megatron_glmv.convert.lora import open_weights
    from megatron_glmv.convert.mapping import to_hf
    from megatron_glmv.training.assemble import assemble, assemble_model
    from megatron_glmv.training.checkpoint import Checkpointer

    shape, assembly = config.model.shape, assemble(config, assemble_model(config))
    Checkpointer(config, assembly.chunks, assembly.optimizer).load_latest()
    live = dict(gather_hf_tensors(assembly.chunks, shape))
    if torch.distributed.get_rank():
        return None
    folder = config.run_folder / "checkpoints" / "step_00000002"
    merged, base = open_weights(folder, shape), CheckpointTensors(folder, shape)
    worst, changed = 0.0, 0
    for name in entries(shape):
        plain = to_hf(name, base.read(name), shape)
        for hf_name, tensor in to_hf(name, merged.read(name), shape).items():
            worst = max(worst, float((tensor - live[hf_name]).abs().max()))
            changed += not tensor.equal(plain[hf_name])
    return len(live), worst, changed


def refused(architecture: str, layout: dict[str, Any]) -> dict[str, str]:
    """What is said of runs whose adapters are not those of the checkpoint."""
    from megatron_glmv.training.assemble import assemble, assemble_model
    from megatron_glmv.training.checkpoint import Checkpointer
    from megatron_glmv.training.checkpoint_files import CheckpointError

    def message(name: str, lora: dict[str, Any], start_from: str | None = None) -> str:
        config = config_of(architecture, name, layout, **lora)
        assembly = assemble(config, assemble_model(config))
        checkpointer = Checkpointer(config, assembly.chunks, assembly.optimizer)
        try:
            if start_from is None:
                checkpointer.load_latest()
            else:
                checkpointer.load_weights_only(Path(architecture) / "runs" / start_from)
        except CheckpointError as error:
            return str(error)
        return "accepted"

    name, kind = next(iter(KINDS.items()))
    return {
        "another rank": message(name, kind | {"rank": 5}),
        "no adapters": message(name, {}),
        "adapters where there were none": message("base", kind),
        "start from others": message("new", {"targets": ("q_proj",)}, name),
        "start from adapters without any": message("new", {}, name),
        "start from the same": message("new", kind, name),
    }


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("lora")
    (folder / "config.json").write_text(json.dumps(oracle.hf_config("digits")))
    return run_ranks(train_in_layouts, 4, str(folder), timeout_s=300)[0]


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_another_layout_continues_with_the_same_losses(report: Report, kind: str, layout: str) -> None:
    assert report[kind][layout] == pytest.approx(report[kind]["unbroken"], rel=1e-5)


def test_updates_matter(report: Report) -> None:
    """Otherwise equality would say nothing about the optimizer."""
    for kind in KINDS:
        first, *_, last = report[kind]["unbroken"]
        assert abs(first - last) > 1e-4, kind


def test_weights_do_not_change(report: Report) -> None:
    assert report["errors"]["changed"] == []


def test_a_live_model_gives_merged_weights(report: Report) -> None:
    for kind, num_adapted in (("some of every kind", 12), ("only vision", 10)):
        num_tensors, worst, changed = report[kind]["live"]
        assert (num_tensors, changed) == (82, num_adapted)
        assert worst <= 1e-7


def test_other_adapters_are_refused_in_one_line(report: Report) -> None:
    errors = report["errors"]
    assert "model.lora was {'rank': 4" in errors["another rank"] and "is {'rank': 5" in errors["another rank"]
    assert "and is None now" in errors["no adapters"]
    assert "model.lora was None when" in errors["adapters where there were none"]
    assert "glmv export, then model.hf_folder" in errors["start from others"]
    assert "glmv export, then model.hf_folder" in errors["start from adapters without any"]
    assert errors["start from the same"] == "accepted"
    assert not any("\n" in message for message in errors.values() if isinstance(message, str))
