"""How much of a training step on a CPU is matrix products: the step, and the same products alone, by turns in one run.

    python benchmarks/product_share.py [--size 100m] [--threads 2] [--rounds 5] [--quick]

One rank trains on the quickstart's packed rows. Every matrix product of a real step, forward and backward, attention included,
is recorded with the shapes, strides and number formats of its operands, and replayed on fresh tensors with nothing between. The
share is the time of the replay over that of the step, medians of rounds in which both run by turns. Target: 60 % or more. The
second table lists what else the step spends time on, from torch's profiler.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from digits_model import SIZES, run_config, write_rows
from operations import PRODUCTS, Recorder, prepare
from our_loop import Loop

FOLDER = Path("runs/benchmarks")
TARGET = 0.6
WARM_UP = 2
LISTED = 12
"""Costs of the second table."""


def measure(loop: Loop, rounds: int) -> tuple[list[float], list[float], Counter[str]]:
    """Seconds of steps and of their products alone, by turns, and how many products there are of each kind."""
    loop.steps(WARM_UP)
    with Recorder() as recorder:
        loop.step()
    alone = prepare(recorder.products)
    replay(alone)
    steps, products = [], []
    for _ in range(rounds):
        steps += loop.steps(1)["seconds"]
        products.append(replay(alone))
    return steps, products, Counter(call.operator.overloadpacket.__name__.lstrip("_") for call in recorder.products)


def replay(products: Sequence[Callable[[], Any]]) -> float:
    """Seconds of all products, one after the other."""
    started = time.perf_counter()
    for product in products:
        product()
    return time.perf_counter() - started


def other_costs(loop: Loop) -> tuple[float, list[tuple[str, int, float]]]:
    """Seconds of a profiled step, and its costliest operators but the products: name, calls, seconds of its own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        seconds = loop.steps(1)["seconds"][0]
    products = {f"aten::{name}" for name in PRODUCTS}
    events = [event for event in profiler.key_averages() if event.key not in products]
    events.sort(key=lambda event: -event.self_cpu_time_total)
    return seconds, [(event.key, event.count, event.self_cpu_time_total / 1e6) for event in events]


def report(name: str, threads: int, loop: Loop, rounds: int) -> bool:
    """Measure and print both tables; whether the target is met."""
    steps, products, kinds = measure(loop, rounds)
    flops = loop.steps(1)["flops"][0]
    step, alone = statistics.median(steps), statistics.median(products)
    share = alone / step
    print(f"{name}, one rank, {threads} threads, {rounds} rounds: {sum(kinds.values())} products a step "
          f"({', '.join(f'{count} {kind}' for kind, count in kinds.most_common())})\n")  # fmt: skip
    print("| | seconds | GFLOP/s | share of the step | target |\n| --- | --- | --- | --- | --- |")
    print(f"| step | {step:.3f} | {flops / step / 1e9:.0f} | 1 | |")
    print(f"| its products alone | {alone:.3f} | {flops / alone / 1e9:.0f} | {share:.1%} | {TARGET:.0%} |\n")
    seconds, costs = other_costs(loop)
    print(f"| what else | calls | seconds of {seconds:.3f} profiled | share |\n| --- | --- | --- | --- |")
    for key, count, own in costs[:LISTED]:
        print(f"| {key} | {count} | {own:.4f} | {own / seconds:.1%} |")
    print(f"| {len(costs) - LISTED} others | | {sum(own for *_, own in costs[LISTED:]):.4f} | "
          f"{sum(own for *_, own in costs[LISTED:]) / seconds:.1%} |")  # fmt: skip
    return share >= TARGET


def main() -> int:
    """Build the run and print the tables; 1 when the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the rows, which stay for the next time")
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a trial of the script: the smallest model, one round")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = "1m" if arguments.quick else arguments.size
    rows = write_rows(arguments.folder, few=arguments.quick)
    loop = Loop(run_config(size, arguments.folder, rows, global_batch_rows=1))
    try:
        return 0 if report(size, arguments.threads, loop, 1 if arguments.quick else arguments.rounds) else 1
    finally:
        loop.close()


if __name__ == "__main__":
    sys.exit(main())
