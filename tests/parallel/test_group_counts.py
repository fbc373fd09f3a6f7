"""Process groups of large jobs, counted by Megatron's own code in one process that believes to be rank 0 of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.ranks import run_ranks

LAYOUTS = [(64, {"tensor": 2}), (1024, {"tensor": 2}), (1024, {"tensor": 2, "pipeline": 4, "context": 2})]


def count_all(rank: int) -> list[tuple[int, int]]:
    """For each layout, groups that are made and groups that rank 0 is in."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_glmv.config.parallel import ParallelConfig
    from megatron_glmv.parallel import groups

    found, original = [], dist.new_group
    for ranks, layout in LAYOUTS:
        made: list[bool] = []

        def new_group(members: Sequence[int] | None = None, *args: Any, made: list[bool] = made, **named: Any) -> Any:
            members = named.get("ranks", members)
            made.append(members is None or 0 in members)
            return original(members, *args, **{key: value for key, value in named.items() if key != "ranks"})

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        dist.new_group = new_group
        groups.initialize(ParallelConfig(**layout), seed=1)
        dist.new_group = original
        groups.destroy()
        found.append((len(made), sum(made)))
    return found


def test_a_rank_joins_as_many_groups_whatever_the_number_of_ranks() -> None:
    small, large, pipelined = run_ranks(count_all, 1)[0]
    assert small[1] == large[1] == pipelined[1] == 17
    # Every rank calls the creation of all groups, which grows with the ranks; only its own ones open connections.
    assert small[0] < large[0] < 9 * 1024
