"""Training tokens a second on two CPU cores, beside a transformers loop on the same samples.

    python benchmarks/against_transformers.py [--sizes 1m 100m] [--rounds 3] [--quick]

Two models: the quickstart's (1.1 M parameters) and one of 102.6 M in the proportions of GLM-4.1V. The rows are the
quickstart's, handwritten digits with short questions. Only useful tokens count, no padding; all sides see the same samples in
every step.

    megatron-glmv            packed rows through the parts of `glmv train`: one rank with two threads, for the smaller models
                             also two data-parallel ranks with one; the same again while DALI decodes the next rows
    transformers             Glm4vForConditionalGeneration with sdpa on the samples in one batch, padded to the longest;
                             torch.optim.AdamW and clipping; as it comes
    transformers, matmuls    the same with the two convolutions of its vision tower replaced by equal matrix products

All compute in float32 on two threads, from pictures that are decoded before the clock runs, but for the last of our sides;
transformers' are also normalised before it. All sides start from the same weights, and the losses of their first batch must
agree within 0.001. The sides run by turns, and the medians of the rounds are given. Targets: 3 times transformers as it comes,
1.5 times transformers with matmuls. Above the table stand the operations of transformers' batch over those of our rows: what
its padding costs, and its tokens without a loss behind the last attention, where both sides compute equally fast.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

from digits_model import LENGTH, SIZES, write_rows
from sides import Side

FOLDER = Path("runs/benchmarks")
OURS, WHOLE, MATMULS = "megatron-glmv", "transformers", "transformers, matmuls"


class Effort(NamedTuple):
    """What is measured of one model."""

    batch: int
    """Packed rows of a step; with two of them two replicas are a side, too."""
    steps: int
    """Of a round."""
    warm_up: int


EFFORTS = {"1m": Effort(2, 20, 4), "10m": Effort(2, 8, 2), "100m": Effort(1, 2, 1)}
QUICK = Effort(2, 1, 1)
LOSS_TOLERANCE = 1e-3
GATES = {WHOLE: 3.0, MATMULS: 1.5}


def compare(name: str, folder: Path, rows: Path, rounds: int, effort: Effort) -> bool:
    """Measure one model and print its table; whether both targets are met."""
    common = [name, str(folder), str(rows), "--batch", str(effort.batch)]
    total = ["--steps", str(effort.warm_up + rounds * effort.steps)]
    with ExitStack() as stack:

        def start(side: str, script: str, *extra: str, ranks: int = 1, threads: int = 2) -> Side:
            return stack.enter_context(closing(Side(side, script, [*common, *extra], ranks=ranks, threads=threads)))

        decoded = ["--decoded", total[1]]
        ours = [start(f"{OURS}, 1 rank x 2 threads", "our_loop.py", *decoded)]
        if effort.batch > 1:
            ours.append(start(f"{OURS}, 2 ranks x 1 thread", "our_loop.py", *decoded, ranks=2, threads=1))
            ours.append(start(f"{OURS}, 2 ranks x 1 thread, decoding", "our_loop.py", ranks=2, threads=1))
        else:
            ours.append(start(f"{OURS}, 1 rank x 2 threads, decoding", "our_loop.py"))
        theirs = [start(WHOLE, "transformers_loop.py", *total), start(MATMULS, "transformers_loop.py", *total, "--matmuls")]
        weights = folder / f"weights-{name}.safetensors"
        parameters = ours[0].ask("weights", path=str(weights))
        for side in theirs:
            side.ask("load", path=str(weights))
        firsts = {side.name: side.ask("steps", count=effort.warm_up)["losses"][0] for side in [*ours, *theirs]}
        _check_losses(firsts)
        rates: dict[str, list[float]] = {side.name: [] for side in [*ours, *theirs]}
        losses: dict[str, float] = {}
        towers: dict[str, int] = {}
        padded = 0
        for _ in range(rounds):
            for side in [*ours, *theirs]:
                found = side.ask("steps", count=effort.steps)
                rates[side.name].append(sum(found["tokens"]) / sum(found["seconds"]))
                losses[side.name], padded = found["losses"][-1], found.get("padded", padded)
                useful, towers = found["tokens"][-1], found.get("towers", towers)
        decoder = ours[0].ask("operations")
    places = effort.batch * LENGTH
    vision, own = towers["vision"] + towers["merger"], towers["text"] + towers["head"]
    times = (vision + decoder * padded / useful) / (vision + own * places / useful)
    print(f"\n{name}: {parameters:,} parameters; {rounds} rounds of {effort.steps} steps of {effort.batch} packed rows, the "
          f"last of {useful:,} useful tokens in {places:,} places, and in {padded:,} of transformers' padded batch, which "
          f"takes {times:.2f} x the operations\n")  # fmt: skip
    return _print(rates, firsts, losses)


def _check_losses(firsts: dict[str, float]) -> None:
    spread = max(firsts.values()) - min(firsts.values())
    if not spread <= LOSS_TOLERANCE:
        raise SystemExit(f"the sides do not compute the same: losses of the first batch {firsts}")


def _print(rates: dict[str, list[float]], firsts: dict[str, float], losses: dict[str, float]) -> bool:
    """The table; whether both targets are met."""
    medians = {side: statistics.median(found) for side, found in rates.items()}
    best = max((side for side in medians if side.startswith(OURS)), key=medians.__getitem__)
    print("| side | useful tokens/s | worst to best round | best of ours is | target | first loss | last loss |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    met = True
    for side, rate in medians.items():
        times, gate = medians[best] / rate, GATES.get(side)
        met = met and (gate is None or times >= gate)
        print(f"| {side} | {rate:,.0f} | {min(rates[side]):,.0f} to {max(rates[side]):,.0f} | {times:.2f} x | "
              f"{f'{gate} x' if gate else ''} | {firsts[side]:.5f} | {losses[side]:.5f} |")  # fmt: skip
    return met


def main() -> int:
    """Measure every size; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for rows and weights; the rows stay for the next time")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1m", "100m"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a trial of the script: the smallest model, one step a round")
    arguments = parser.parse_args()
    rows = write_rows(arguments.folder, few=arguments.quick)
    sizes, rounds = (["1m"], 1) if arguments.quick else (arguments.sizes, arguments.rounds)
    met = [compare(name, arguments.folder, rows, rounds, QUICK if arguments.quick else EFFORTS[name]) for name in sizes]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
