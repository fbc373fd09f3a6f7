"""GLM's own checkpoints across layouts: both towers, a rate per part, context parallelism, uneven stages, and frozen parts.

The gate is the layouts' own (tests/model/test_layouts.py): only the order of fp32 sums differs, here over three updates.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_glmv.run_folder import checkpoint_folder as folders
from tests.model import oracle
from tests.ranks import leave_layout, run_ranks

SAVED: dict[str, Any] = {"tensor": 2, "pipeline": 2, "first_stage_layers": 1, "vision": "images"}
OTHERS: dict[str, dict[str, Any]] = {
    "tensor 2 x context 2": {"tensor": 2, "context": 2},
    "pipeline 2 x virtual 2 x data 2": {"pipeline": 2, "virtual_pipeline": 2},
    "pipeline 2, the vision tower alone on the first, data 2": {"pipeline": 2, "first_stage_layers": 0},
}
KINDS: dict[str, dict[str, Any]] = {
    "sharded optimizer": {"distributed_optimizer": True},
    "whole optimizer": {"distributed_optimizer": False},
    "only text learns": {"distributed_optimizer": True, "freeze": ["vision", "merger"]},
    "only vision learns": {"distributed_optimizer": True, "freeze": ["text", "merger"]},
}
STEPS = 3


def losses_by_layout(rank: int, architecture: str, root: str) -> dict[str, dict[str, list[float]]]:
    """For each kind: losses of an unbroken run after its save, and of runs that resumed from it in other layouts."""
    from megatron_glmv.parallel import groups

    report: dict[str, dict[str, list[float]]] = {name: {} for name in KINDS}
    for layout_name, layout in {"unbroken": SAVED, "the same": SAVED, **OTHERS}.items():
        groups.initialize(config_of(architecture, Path(root), layout, {}).parallel, seed=1)
        for name, kind in KINDS.items():
            config = config_of(architecture, Path(root) / name, layout, kind)
            with asked_bytes() as asked:
                report[name][layout_name] = run(config, saves=layout_name == "unbroken")
            if layout_name == "unbroken":
                files = (config.run_folder / "checkpoints" / "step_00000002").iterdir()
                report[name]["bytes"] = [sum(asked), sum(file.stat().st_size for file in files)]
        leave_layout()
    return report


@contextlib.contextmanager
def asked_bytes() -> Iterator[list[int]]:
    """What a save asks the disk for; on rank 0."""
    asked: list[int] = []
    open_partial = folders.open_partial

    def spy(folder: Path, needed_bytes: int, *others: int) -> Path:
        asked.append(needed_bytes)
        return open_partial(folder, needed_bytes, *others)

    folders.open_partial = spy
    yield asked
    folders.open_partial = open_partial


def config_of(architecture: str, run_folder: Path, layout: dict[str, Any], kind: dict[str, Any]) -> Any:
    from megatron_glmv.config.training import TrainConfig
    from tests.model.layouts import train_config

    own = dict(kind)
    freeze = own.pop("freeze", [])
    tree = train_config(architecture, layout | own, {}).model_dump()
    tree |= {"run_folder": run_folder, "steps": 20}
    tree["model"] |= {"freeze": freeze}
    tree["optimizer"] |= {"lr": 1e-3, "vision_lr": 3e-4, "merger_lr": 2e-3, "warmup_steps": 4}
    return TrainConfig.model_validate(tree)


def run(config: Any, *, saves: bool) -> list[float]:
    """Either two steps, a save and STEPS more, or STEPS from that save; returns the losses of the last STEPS."""
    from megatron_glmv.training.assemble import assemble, assemble_model
    from megatron_glmv.training.checkpoint import Checkpointer
    from megatron_glmv.training.state import TrainState

    # Another seed than the saved run's: the weights must come from the checkpoint.
    seeded = config.model_copy(update={"seed": 1 if saves else 2})
    assembly = assemble(seeded, assemble_model(seeded))
    checkpointer = Checkpointer(config, assembly.chunks, assembly.optimizer)
    if saves:
        for step in range(2):
            update(assembly, step)
        checkpointer.save(TrainState(step=2))
    else:
        assert checkpointer.load_latest() == TrainState(step=2)
    return [update(assembly, step) for step in range(2, 2 + STEPS)]


def update(assembly: Any, step: int) -> float:
    from megatron_glmv.parallel import groups
    from megatron_glmv.training.optimizer import set_learning_rates, step_optimizer
    from megatron_glmv.training.step import reduce_loss, run_schedule
    from tests.model.layouts import make_rows

    for chunk in assembly.chunks:
        chunk.zero_grad_buffer()
    assembly.optimizer.zero_grad()
    rows = make_rows(assembly.shape)
    share = len(rows) // groups.data_size()
    own = rows[groups.data_rank() * share :][:share]
    loss: tuple[float | Tensor, Any] = reduce_loss(run_schedule(assembly, own, forward_only=False))
    set_learning_rates(assembly.optimizer, step, assembly.config)
    assert step_optimizer(assembly.optimizer).applied
    return float(loss[0])


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("glm")
    (folder / "config.json").write_text(json.dumps(oracle.hf_config("digits")))
    return run_ranks(losses_by_layout, 4, str(folder), str(folder / "runs"), timeout_s=300)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_layout_continues_bit_for_bit(losses: dict[str, dict[str, list[float]]], kind: str) -> None:
    assert losses[kind]["the same"] == losses[kind]["unbroken"]


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_another_layout_continues_with_the_same_losses(
    losses: dict[str, dict[str, list[float]]], kind: str, layout: str
) -> None:
    assert losses[kind][layout] == pytest.approx(losses[kind]["unbroken"], rel=1e-5)


def test_a_save_asks_for_the_room_that_it_takes(losses: dict[str, dict[str, list[float]]]) -> None:
    """Descriptions of the tensors and the folder's small files, for which room is held, are not counted: at most 0.94 MB."""
    for kind in KINDS:
        asked, written = losses[kind]["bytes"]
        assert 0 <= written - asked < 2**20, kind


def test_updates_matter(losses: dict[str, dict[str, list[float]]]) -> None:
    """Otherwise equality would say nothing about the optimizer."""
    for kind in KINDS:
        first, *_, last = losses[kind]["unbroken"]
        assert abs(first - last) > 1e-4, kind
