"""What the platform makes of a CUDA node without Transformer Engine and apex, whose Megatron is brought about on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_glmv.parallel import platform
from megatron_glmv.training.state import TrainState
from tests.ranks import run_ranks

KINDS = ((True, "bf16"), (True, "fp32"), (False, "bf16"))
"""Distributed optimizer, precision."""
pytestmark = pytest.mark.skipif(platform.has_cuda(), reason="brought about on the CPU")


def losses_of(rank: int, folder: str) -> dict[Any, list[list[float]]]:
    """Of each kind: losses of three steps after a save, of the same after a resume, and after going back within the run."""
    choose_torch_optimizer()
    report: dict[Any, list[list[float]]] = {}
    for kind in KINDS:
        for steps in (0, 2):
            report[*kind, steps] = save_and_go_on(Path(folder) / f"{kind}-{steps}", *kind, steps)
    return report


def choose_torch_optimizer() -> None:
    """Leave Megatron as it finds itself on such a node, and the platform to what it does there."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer
    from torch.optim.adamw import AdamW

    torch.optim.AdamW = AdamW
    optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = False
    has_cuda, platform.has_cuda = platform.has_cuda, lambda: True
    platform.activate()
    platform.has_cuda = has_cuda


def save_and_go_on(run_folder: Path, distributed: bool, dtype: str, steps: int) -> list[list[float]]:
    trainer, checkpointer = opened(run_folder, distributed, dtype)
    for step in range(steps):
        trainer.step(step)
    checkpointer.save(TrainState(step=5))
    unbroken = [trainer.step(step)[0] for step in range(2, 5)]
    checkpointer.return_to_latest()
    again = [trainer.step(step)[0] for step in range(2, 5)]
    trainer, checkpointer = opened(run_folder, distributed, dtype, seed=99)
    checkpointer.load_latest()
    return [unbroken, again, [trainer.step(step)[0] for step in range(2, 5)]]


def opened(run_folder: Path, distributed: bool, dtype: str, seed: int = 11) -> tuple[Any, Any]:
    from megatron_glmv.training.checkpoint import Checkpointer
    from tests.training.stock_gpt import Trainer, make_config

    config = make_config(run_folder, {}, distributed_optimizer=distributed, dtype=dtype)
    trainer = Trainer.build(config, seed=seed)
    return trainer, Checkpointer(config, trainer.chunks, trainer.optimizer)


def test_a_run_without_fused_optimizers_goes_on_from_what_it_has_saved(tmp_path: Path) -> None:
    """Also from a save before the first update, as all updates may have been refused until then."""
    [report] = run_ranks(losses_of, 1, str(tmp_path), timeout_s=200)
    for kind, (unbroken, again, resumed) in report.items():
        assert unbroken == again == resumed, kind
