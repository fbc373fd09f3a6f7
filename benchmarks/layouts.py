"""Step time of two ranks with one thread each, in three layouts, against one rank with two threads, for three sizes of model.

    python benchmarks/layouts.py [--sizes 1m 10m 100m] [--rounds 3] [--quick]

    DP2   two replicas, half of the rows each; gradients and weights are exchanged once a step
    TP2   every matrix shared by two ranks, with sequence parallelism; activations are exchanged in every layer
    PP2   half of the decoder's layers each, the vision tower on the first stage; activations pass once a row

All train on the same rows of the quickstart, 4 a step, in float32. The sides run by turns, and the medians of the rounds are
given. Overhead is the step time over that of one rank, less one. What explains it is computed: the exchanges of a step,
recorded as they are dispatched, at the price that a message and a byte have in an all-reduce of this run; and for the pipeline
its bubble, (stages - 1) / rows, and how much costlier than the mean its costlier stage is, in operations. What is left is work
that the ranks repeat (norms and inputs under TP2), less what one rank with two threads itself loses to work that threads cannot
share.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack, closing
from pathlib import Path

from digits_model import SIZES, write_rows
from sides import Side, run_by_turns

FOLDER = Path("runs/benchmarks")
ALONE = "one rank"
LAYOUTS = {"DP2": (), "TP2": ("--tensor", "2"), "PP2": ("--pipeline", "2")}
BATCH_ROWS = 4
STEPS = {"1m": 10, "10m": 4, "100m": 1}
"""Of a round."""
HEADER = ("model", "layout", "seconds a step", "overhead", "exchanges", "MB", "computed: exchange s", "computed: pipeline s",
          "not explained s")  # fmt: skip


def compare(name: str, folder: Path, rows: Path, rounds: int, steps: int) -> dict[str, float]:
    """Measure one model in every layout and print its lines; the overhead of each layout."""
    common = [name, str(folder), str(rows), "--batch", str(BATCH_ROWS)]
    with ExitStack() as stack:
        sides = [stack.enter_context(closing(Side(ALONE, "our_loop.py", common, threads=2)))]
        for layout, extra in LAYOUTS.items():
            sides.append(stack.enter_context(closing(Side(layout, "our_loop.py", [*common, *extra], ranks=2))))
        exchanges = {side.name: side.ask("exchanges") for side in sides}  # the first step of each, which warms up
        works = {side.name: side.ask("steps", count=1)["towers"] for side in sides}
        seconds = {side: statistics.median(found) for side, found in run_by_turns(sides, rounds, steps).items()}
    one = seconds[ALONE]
    for side, step in seconds.items():
        own = exchanges[side]
        talk = own["messages"] * own["message_s"] + own["bytes"] * own["byte_s"]
        idle = pipeline_idle(works[side]) * one if side == "PP2" else 0.0
        left = step - one - talk - idle
        measured = f"{step:.3f} | {step / one - 1:+.1%} | {own['messages']} | {own['bytes'] / 1e6:.1f}"
        print(f"| {name} | {side} | {measured} | {talk:.3f} | {idle:.3f} | {left:.3f} |")
    return {side: step / one - 1 for side, step in seconds.items() if side != ALONE}


def pipeline_idle(towers: dict[str, float], stages: int = 2) -> float:
    """Time that a pipeline loses over its work divided evenly: bubble and uneven stages, as a share of that work's time."""
    first = towers["vision"] + towers["merger"] + towers["text"] / stages
    last = towers["text"] / stages + towers["head"]
    uneven = max(first, last) * stages / sum(towers.values())
    return uneven * (BATCH_ROWS + stages - 1) / BATCH_ROWS - 1


def explain(overheads: dict[str, dict[str, float]]) -> bool:
    """One sentence a layout: how its overhead changes with the size of the model; whether all fall."""
    print()
    fall = True
    for layout in LAYOUTS:
        values = [found[layout] for found in overheads.values()]
        falls = values == sorted(values, reverse=True)
        line = ", ".join(f"{found[layout]:+.0%} at {name}" for name, found in overheads.items())
        trend = f": {'falling' if falls else 'not falling'} with model size" if len(values) > 1 else ""
        print(f"{layout}: overhead {line}{trend}.")
        fall = fall and falls
    return fall


def main() -> int:
    """Measure every size; 1 when the overhead of a layout does not fall with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the rows, which stay for the next time")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a trial of the script: the smallest model, one step a round")
    arguments = parser.parse_args()
    rows = write_rows(arguments.folder, few=arguments.quick)
    print(f"{BATCH_ROWS} rows a step; {ALONE} has two threads, the ranks of the layouts one each\n")
    print(f"| {' | '.join(HEADER)} |\n{'| --- ' * len(HEADER)}|")
    overheads: dict[str, dict[str, float]] = {}
    for name in ["1m"] if arguments.quick else arguments.sizes:
        rounds, steps = (1, 1) if arguments.quick else (arguments.rounds, STEPS[name])
        overheads[name] = compare(name, arguments.folder, rows, rounds, steps)
    return 0 if explain(overheads) else 1


if __name__ == "__main__":
    sys.exit(main())
