"""Share of the device's peak that training reaches on a slice of the 9B at full width: photos and text, BF16 and FP8.

    python benchmarks/gpu_mfu.py [--rows-of pictures] [--recipes off current] [--layers N]   # one CUDA device
    python benchmarks/gpu_mfu.py --dry-run                                                   # anywhere: plan, shapes checked
    python benchmarks/gpu_mfu.py --quick                                                     # anywhere: a tiny model

The whole vision tower, merger, embedding and head, and as many of the 40 decoder layers as fit beside them. Operations are
those of `plan/flops.py`: what the model needs for tokens that are not padding, forward and backward; recomputation does not
count. MFU is over the dense BF16 peak in every line, so that lines compare; FP8's own peak is twice that. Rows are decoded
before the clock starts (`gpu_decode.py` measures the loader). Both sides of every ratio are measured in the same run, and every
line is printed when it is measured.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

import torch
from gpu_slice import TINY, Settings, check_on_meta, device_memory_gb, fitting, plan, run, slice_shape

from megatron_glmv.config.count import count_parameters
from megatron_glmv.parallel import platform

TARGETS = {"pictures": 0.40, "text": 0.50, "speedup": 1.3}
"""MFU of rows of photos and of text in BF16, and FP8 tokens/s over BF16's."""


def main() -> int:
    """Parse the command line, run or plan, print the table; 1 when a run fails or, but for --quick, a target is missed."""
    arguments = parse(sys.argv[1:])
    platform.activate()
    settings = TINY if arguments.quick else Settings(layers=arguments.layers or 4, rows=arguments.rows, steps=arguments.steps)
    if arguments.dry_run:
        return dry_run(settings, arguments)
    if not torch.cuda.is_available() and not arguments.quick:
        print("skipped: no CUDA device here; --dry-run prints the plan, --quick runs a tiny model")
        return 0
    return compare(settings, arguments)


def parse(given: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipes = ("off", "current", "delayed", "block")
    parser.add_argument("--recipes", nargs="+", choices=recipes, default=list(recipes), help="off is BF16")
    parser.add_argument("--rows-of", nargs="+", choices=("pictures", "text"), default=["pictures", "text"])
    parser.add_argument("--layers", type=int, help="decoder layers; default: as many as fit")
    parser.add_argument("--memory-gb", type=float, help="plan for a device of this size; default: this one's")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each line")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and check shapes on the meta device")
    parser.add_argument("--quick", action="store_true", help="the quickstart's model, two steps")
    return parser.parse_args(given)


def chosen(settings: Settings, arguments: argparse.Namespace) -> list[Settings]:
    """The runs: of each kind of rows every recipe, with the same layers, which must fit with FP8's copies too; BF16 first."""
    found = []
    for kind in arguments.rows_of:
        widest = "current" if set(arguments.recipes) != {"off"} else "off"
        base = replace(settings, pictures=kind == "pictures", recipe=widest)
        if arguments.layers is None and not arguments.quick:
            base = fitting(base, arguments.memory_gb or device_memory_gb())
        found += [replace(base, recipe=recipe) for recipe in sorted(arguments.recipes, key=lambda recipe: recipe != "off")]
    return found


def dry_run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Print what would run, and build every distinct slice on the meta device."""
    memory_gb = arguments.memory_gb or device_memory_gb()
    print(f"plan for {memory_gb:.1f} GB\n")
    print(
        "| rows | recipe | decoder layers | ViT recomputed | parameters | patches a row | TFLOP a row | memory, estimated GB |"
    )
    print("| --- " * 8 + "|")
    for one in chosen(settings, arguments):
        amounts = plan(one, memory_gb)
        print(f"| {_kind(one)} | {one.recipe} | {one.layers} | {one.recompute_vision} | {amounts.parameters:,} | "
              f"{amounts.patches:,} | {amounts.row_tflop:.1f} | {amounts.memory_gb:.1f} |")  # fmt: skip
    for one in {replace(one, recipe="off"): None for one in chosen(settings, arguments)}:
        found, shape = check_on_meta(one), slice_shape(one)
        assert found["parameters"] == count_parameters(shape).total, found
        assert found["logits"] == (one.length, 1, shape.text.vocab_size), found
        built = f"{_kind(one)}, {one.layers} layers, {found['parameters']:,} parameters, logits {found['logits']}"
        print(f"\non the meta device: {built}")
    return 0


def compare(settings: Settings, arguments: argparse.Namespace) -> int:
    """Run every line and print it."""
    print(f"{settings.preset}, rows of {settings.length:,} tokens, {settings.rows} a step, {settings.steps} steps, "
          f"{platform.device_name()}, torch {torch.__version__}\n")  # fmt: skip
    print("| rows | precision | layers | decoder layers | tokens/s | of BF16 | TFLOP/s | MFU of BF16's peak | memory, GB |")
    print("| --- " * 9 + "|", flush=True)
    base: dict[str, float] = {}
    failed, missed = [], []
    for one in chosen(settings, arguments):
        report = run(one)
        if "error" in report:
            print(f"| {_kind(one)} | {one.recipe} | | {one.layers} | failed: {report['error']} | | | | |", flush=True)
            failed.append(f"{_kind(one)} {one.recipe}")
            continue
        if one.recipe == "off":
            base[_kind(one)] = report["tokens_s"]
        print(_line(one, report, base.get(_kind(one))), flush=True)
        missed += [] if arguments.quick else _missed(one, report, base.get(_kind(one)))
    if failed or missed:
        print(f"missed: {', '.join([*failed, *missed])}", file=sys.stderr)
    return 1 if failed or missed else 0


def _line(one: Settings, report: dict[str, Any], bf16: float | None) -> str:
    share = f"{report['tokens_s'] / bf16:.2f}" if bf16 else ""
    mfu = f"{report['mfu']:.1%}" if report["mfu"] else "peak not known"
    memory = f"{report['memory_gb']:.1f}" if report["memory_gb"] else ""
    cells = [_kind(one), report["precision"], report["layer_kind"], one.layers, f"{report['tokens_s']:,.0f}", share,
             f"{report['tflop_s']:.1f}", mfu, memory]  # fmt: skip
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _missed(one: Settings, report: dict[str, Any], bf16: float | None) -> list[str]:
    """Targets that a line does not reach."""
    if one.recipe == "off":
        return [f"{_kind(one)} MFU"] if report["mfu"] is None or report["mfu"] < TARGETS[_kind(one)] else []
    slow = bf16 and one.recipe == "current" and report["tokens_s"] < TARGETS["speedup"] * bf16
    return [f"{_kind(one)} FP8 over BF16"] if slow else []


def _kind(one: Settings) -> str:
    return "pictures" if one.pictures else "text"


if __name__ == "__main__":
    sys.exit(main())
