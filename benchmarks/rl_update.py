"""What repacking saves: the time of one policy update on a long-tailed batch, packed and dealt in three ways.

    python benchmarks/rl_update.py [--ranks 2] [--answers 64] [--rounds 3]

Answers with log-normal lengths (median 60 tokens, at most 600) behind 0 to 12 pictures, geometrically distributed, on the tiny
model of the quickstart, are trained on as

    repacked   packed into rows of 1,024 tokens and dealt by length and compute (`rl/repack.py`), as `glmv rl` does
    packed     packed by best fit, rows dealt in turn: equal numbers of rows, unequal work
    one a row  one answer a row, padded to 1,024 tokens

by the same ranks, one way after the other, round by round; the table gives the median seconds of forward, backward and update.
The paper reports that repacking halves the time (arXiv 2507.01006, section 5.4).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_glmv.config.base import validate
from megatron_glmv.config.rl import AlgorithmConfig
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.parallel import groups
from megatron_glmv.rl.batch import PolicySample, build_row, compute_loads
from megatron_glmv.rl.repack import Plan, plan_rows, skew
from megatron_glmv.rl.update import update_policy
from megatron_glmv.training.assemble import assemble, assemble_model

LENGTH = 1024
GRID = (4, 16)
WAYS = ("repacked", "packed", "one a row")


def draw_samples(number: int, image_token: int, patch_dim: int) -> list[PolicySample]:
    """Long-tailed answers to prompts with a long-tailed number of pictures."""
    random = np.random.default_rng(0)
    size = GRID[0] * GRID[1]
    found = []
    for place in range(number):
        answer = int(np.clip(random.lognormal(np.log(60), 1.1), 4, 600))
        pictures = min(int(random.geometric(0.3)) - 1, 12)
        visual = np.full(size // 4, image_token)
        parts = [part for _ in range(pictures) for part in (random.integers(30, 300, 2), visual)]
        tokens = np.concatenate((*parts, random.integers(30, 300, 8 + answer)))
        trained = np.arange(len(tokens)) >= len(tokens) - answer
        patches = torch.from_numpy(random.integers(0, 256, (size * pictures, patch_dim), dtype=np.uint8)) if pictures else None
        logprobs = np.where(trained, -3.0, 0.0).astype(np.float32)
        frames = (GRID,) * pictures
        found.append(PolicySample(str(place), tokens, trained, float(random.normal()), logprobs, frames, patches, place))
    return found


def plans(samples: list[PolicySample], loads: np.ndarray, ranks: int) -> dict[str, Plan]:
    """The three ways: for each rank its rows, for each row its answers."""
    lengths = [len(sample.tokens) for sample in samples]
    together = plan_rows(lengths, loads, num_ranks=1, row_length=LENGTH)[0]
    steps = -(-len(together) // ranks)
    rows = [*together, *((),) * (steps * ranks - len(together))]
    alone: list[tuple[int, ...]] = [(place,) for place in range(len(samples))]
    alone += [()] * (-len(alone) % ranks)
    return {
        "repacked": plan_rows(lengths, loads, num_ranks=ranks, row_length=LENGTH),
        "packed": tuple(tuple(rows[rank::ranks]) for rank in range(ranks)),
        "one a row": tuple(tuple(alone[rank::ranks]) for rank in range(ranks)),
    }


def work(num_answers: int, rounds: int) -> None:
    """One rank's part; rank 0 prints the table."""
    torch.set_num_threads(1)
    config = validate(TrainConfig, {
        "run_folder": tempfile.gettempdir(), "steps": 1, "global_batch_rows": groups.num_ranks(),
        "model": {"preset": "digits"}, "parallel": {"overlap": False}, "precision": {"dtype": "fp32", "layers": "torch"},
        "data": {"sequence_length": LENGTH, "sources": [{"name": "none", "path": "unused"}]}, "optimizer": {"lr": 0.0},
    })  # fmt: skip
    groups.initialize(config.parallel, config.seed)
    assembly = assemble(config, assemble_model(config))
    shape = config.model.shape
    samples = draw_samples(num_answers, shape.tokens.image, shape.vision.patch_dim)
    loads = compute_loads(shape, samples)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    listed = plans(samples, loads, dist.get_world_size())
    for _ in range(rounds + 1):  # the first one warms up
        for way in WAYS:
            own = [[samples[place] for place in row] for row in listed[way][dist.get_rank()]]
            rows = [build_row(row, LENGTH, image_token=shape.tokens.image, pad_token=shape.tokens.pad) for row in own]
            dist.barrier()
            started = time.perf_counter()
            update_policy(assembly, rows, 0, AlgorithmConfig(), 1.0, is_old=True)
            dist.barrier()
            seconds[way].append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        _print(samples, loads, listed, {way: statistics.median(found[1:]) for way, found in seconds.items()})
    groups.destroy()


def _print(samples: list[PolicySample], loads: np.ndarray, listed: dict[str, Plan], seconds: dict[str, float]) -> None:
    tokens = sum(len(sample.tokens) for sample in samples)
    print(f"{len(samples)} answers, {tokens:,} tokens with prompts, {dist.get_world_size()} ranks\n")
    print("| rows | micro-steps | fill | skew of work | seconds | of one a row |")
    print("| --- | --- | --- | --- | --- | --- |")
    for way, plan in listed.items():
        work = [float(sum(loads[list(row)].sum() for row in rank)) for rank in plan]
        fill = tokens / (len(plan) * len(plan[0]) * LENGTH)
        share = seconds[way] / seconds["one a row"]
        print(f"| {way} | {len(plan[0])} | {fill:.3f} | {skew(work):.3f} | {seconds[way]:.2f} | {share:.2f} |")


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        work(arguments.answers, arguments.rounds)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    launch = LaunchConfig(
        1, 1, arguments.ranks, run_id="rl_update", rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", max_restarts=0
    )
    elastic_launch(launch, sys.executable)(str(Path(__file__).resolve()), *sys.argv[1:])


if __name__ == "__main__":
    main()
