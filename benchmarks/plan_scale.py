"""The 9B on paper: the best layout of each size for 8,192 and 32,768 tokens, and the process groups that it makes.

    python benchmarks/plan_scale.py [--gpus 64 256 1024 4096] [--gpu h100] > table.md

Layouts come from the planner's search; beside them stands what the stage's own file asks for. Groups are counted by Megatron's
own `initialize_model_parallel` in a process that believes to be rank 0 of so many (torch's fake process groups): all that are
made, and those that rank 0 is a member of, which alone open connections.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_glmv.config.base import ConfigError, load
from megatron_glmv.config.parallel import ParallelConfig
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.parallel import groups
from megatron_glmv.plan.devices import Hardware, find_hardware
from megatron_glmv.plan.estimate import Plan, estimate
from megatron_glmv.plan.rows import RowAssumptions, sample_rows
from megatron_glmv.plan.search import override_line, search

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STAGES = ("pretrain", "long_context")


def count_groups(layout: ParallelConfig, gpus: int) -> tuple[int, int]:
    """Process groups that are made on `gpus` ranks, and those that rank 0 is in."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    made, member, original = 0, 0, dist.new_group

    def new_group(ranks: Sequence[int] | None = None, *args: Any, **named: Any) -> Any:
        nonlocal made, member
        made += 1
        member += ranks is None or 0 in ranks
        return original(ranks, *args, **named)

    dist.new_group = new_group
    try:
        groups.initialize(layout, seed=1)
    finally:
        dist.new_group = original
        groups.destroy()
    return made, member


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--gpu", default="h100")
    arguments = parser.parse_args()
    hardware = find_hardware(arguments.gpu)
    for stage in STAGES:
        config = load(TrainConfig, [EXAMPLES / f"{stage}.yaml"])
        print(f"\n`examples/{stage}.yaml`: rows of {config.sequence_length:,} tokens, {config.global_batch_rows:,} a step\n")
        columns = ["GPUs", "overrides", "GB", "bubble", "s a step", "MFU", "tokens/s a GPU", "days", "GPU-hours", "groups"]
        print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
        for gpus in arguments.gpus:
            for plan in plans(config, gpus, hardware):
                print(_line(plan, override_line(config, plan.config)), flush=True)


def plans(config: TrainConfig, gpus: int, hardware: Hardware) -> list[Plan]:
    """The layout of the file where it can deal the batch to so many, and the best one if it is another."""
    rows = sample_rows(config, RowAssumptions())
    best = search(config, gpus, hardware, rows, keep=1).best
    try:
        own = [estimate(config, gpus, hardware, rows)]
    except ConfigError:
        own = []
    return [*own, *(plan for plan in best if override_line(config, plan.config))]


def _line(plan: Plan, overrides: str) -> str:
    made, member = count_groups(plan.config.parallel, plan.gpus)
    memory = f"{plan.memory / 1e9:.1f}" + ("" if plan.fits else ", does not fit")
    shown = f"`{overrides}`" if overrides else "as in the file"
    return (
        f"| {plan.gpus:,} | {shown} | {memory} | {plan.timeline.bubble:.1%} | {plan.step_s:.2f} | {plan.mfu:.1%} | "
        f"{plan.tokens_s / plan.gpus:,.0f} | {plan.hours / 24:.1f} | {plan.hours * plan.gpus:,.0f} | {made:,}, {member} |"
    )


if __name__ == "__main__":
    main()
