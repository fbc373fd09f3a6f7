"""Micro-steps, fill and balance of long-tailed answers repacked for several layouts, in operations of the released 9B.

    python benchmarks/rl_repack.py

prints a table; counts only, no model runs. "Packed only" is best fit with its rows dealt to the ranks in turn.
"""

from __future__ import annotations

import time

import numpy as np

from megatron_glmv.config.model import ModelConfig
from megatron_glmv.data.packing import pack_lengths
from megatron_glmv.rl.batch import PolicySample, compute_loads, describe_plan
from megatron_glmv.rl.repack import Plan, plan_rows

ROW_LENGTH, ALIGN = 32_768, 8
PICTURE = (48, 48)
LAYOUTS = ((2, 128), (8, 1024), (64, 4096), (128, 1024))
"""Data ranks, and answers over all of them."""


def draw_samples(count: int) -> list[PolicySample]:
    """Answers of a log-normal around 2,500 tokens, at most 16,000, behind 300 tokens and 0 to 3 pictures of 576 tokens each."""
    random, samples = np.random.default_rng(count), []
    for number in range(count):
        answer = int(np.clip(random.lognormal(np.log(2500), 1.0), 50, 16_000))
        frames = (PICTURE,) * int(random.integers(0, 4))
        tokens = 300 + answer + sum(rows * columns // 4 for rows, columns in frames)
        zeros, trained = np.zeros(tokens), np.arange(tokens) >= tokens - answer
        samples.append(PolicySample(str(number), zeros.astype(np.int64), trained, 0.0, zeros.astype(np.float32), frames))
    return samples


def pack_only(lengths: list[int], num_ranks: int) -> Plan:
    """Best-fit rows, dealt in turn, and rows of padding at the end of the ranks that got one less."""
    rows = [tuple(row) for row in pack_lengths(lengths, ROW_LENGTH, align=ALIGN)]
    steps = -(-len(rows) // num_ranks)
    return tuple((*rows[rank::num_ranks], *[()] * (steps - len(rows[rank::num_ranks]))) for rank in range(num_ranks))


def main() -> None:
    """Print the table."""
    shape = ModelConfig(preset="glm-4.1v-9b").shape
    print(
        "| ranks | answers | one a row | micro-steps | fill | compute skew | packed only | token skew | packed only | plan, s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for num_ranks, count in LAYOUTS:
        samples = draw_samples(count)
        lengths = [len(sample.tokens) for sample in samples]
        started = time.perf_counter()
        plan = plan_rows(lengths, compute_loads(shape, samples), num_ranks=num_ranks, row_length=ROW_LENGTH, align=ALIGN)
        seconds = time.perf_counter() - started
        ours = describe_plan(plan, samples, shape, row_length=ROW_LENGTH)
        plain = describe_plan(pack_only(lengths, num_ranks), samples, shape, row_length=ROW_LENGTH)
        print(
            f"| {num_ranks} | {count} | {ours.padded_micro_steps} | {ours.micro_steps} | {ours.fill:.3f} "
            f"| {ours.compute_skew:.3f} | {plain.compute_skew:.3f} | {ours.token_skew:.3f} | {plain.token_skew:.3f} "
            f"| {seconds:.2f} |"
        )


if __name__ == "__main__":
    main()
