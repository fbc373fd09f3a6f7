"""`glmv-data grade`: the command line of offline grading; what computes lies on the floor of reinforcement learning."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from data_tools.corpus.job import Part
from megatron_glmv.config.grade import load_grade

HELP = """\
Samples answers to every prompt with one or several models, judges them as training does, and writes the prompts again with
pass_rate, tier (very_hard, hard, medium, easy, very_easy) and pass@k, which `glmv rl` starts its curriculum from. Prompts that
every answer gets right (trivial) or none (unsolvable) teach nothing: they go to GRADED.dropped.jsonl with the reason, as do
prompts whose pictures cannot be read. With several models, pass rates are averaged; a prompt is dropped only where all agree.

A prompt with fewer than grading.min_answers judged answers is kept and not graded. Paths of pictures are rewritten where
GRADED.jsonl lies in another folder. GRADED.report.json holds the table that is printed at the end.

Counts are kept as they come: the same command continues after a kill, and asks again where a judge could not say. Several
machines share one job on a shared disk with --part 0/4 ... --part 3/4; the last to finish writes GRADED.jsonl."""

EPILOG = """\
examples:
  glmv-data grade prompts.jsonl --out graded.jsonl --model runs/sft/hf --config examples/rl.yaml
  glmv-data grade prompts.jsonl --out graded.jsonl --model small --model large --answers 16 --config rewards.yaml --part 0/4
  glmv-data grade prompts.jsonl --out graded.jsonl --model runs/sft/hf --server http://127.0.0.1:8000
  glmv-data grade prompts.jsonl --out graded.jsonl --rollouts runs/rl/rollouts/*.jsonl --config examples/rl.yaml

--config takes the file of a `glmv rl` stage (its sampling, force_answer and rewards are used) or one of `glmv reward`, and
a.b=value; e.g. grading.tier_bounds=[0.1,0.3,0.7,0.9] grading.drop_unsolvable=false"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glmv-data grade`."""
    parser.description, parser.epilog = HELP, EPILOG
    parser.add_argument("prompts", type=Path, nargs="+", metavar="PROMPTS.jsonl", help="prompts, as `glmv rl` reads them")
    parser.add_argument("--out", type=Path, required=True, metavar="GRADED.jsonl", help="to write")
    group = parser.add_argument_group("who answers (at least one)")
    group.add_argument("--model", type=Path, action="append", default=[], metavar="HF_FOLDER", help="may be repeated")
    group.add_argument("--server", action="append", default=[], metavar="http://HOST:PORT",
                       help="vLLM server that loads each model and answers in place of this process; repeatable")  # fmt: skip
    group.add_argument("--rollouts", type=Path, nargs="+", default=[], metavar="FILE",
                       help="answers that `glmv rl` has sampled and judged; together they count as one model")  # fmt: skip
    group = parser.add_argument_group("answers")
    group.add_argument("--config", nargs="+", default=[], metavar="FILE.yaml | a.b=value",
                       help="how answers are sampled and judged (default: every domain's own rewards, no judge)")  # fmt: skip
    group.add_argument(
        "--answers", type=int, metavar="N", help="to each prompt, of each model (default: sampling.group_size, 8)"
    )
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest answer; thinking is then not closed by force")
    group.add_argument("--temperature", type=float, metavar="T", help="(default: sampling.temperature, 1)")
    group.add_argument("--k", type=int, metavar="K", help="of pass@k (default: grading.k, 4)")
    group.add_argument("--domain", metavar="NAME", help="of prompts that name none")
    group.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    group = parser.add_argument_group("running")
    group.add_argument("--processor", type=Path, metavar="FOLDER", help="tokenizer and template (default: the model's folder)")
    group.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="(default: bf16 on a GPU, else fp32)")
    group.add_argument("--max-answers", type=int, default=64, metavar="N",
                       help="answers that decode together (default %(default)s)")  # fmt: skip
    group.add_argument("--max-prompt-tokens", type=int, metavar="N", help="longest prompt (default: what the model can take)")
    group.add_argument("--part", type=Part.parse, default=Part(), metavar="i/n", help="answer this share of the prompts")
    group.add_argument("--max-bad-share", type=float, default=0.01, metavar="SHARE",
                       help="stop when more of the lines cannot be used (default %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Run the tool and print its table.

    Raises:
        ValueError: a number out of its range, or what `megatron_glmv.rl.grade_command.run` raises.
    """
    if args.max_answers < 1 or not 0 <= args.max_bad_share <= 1 or (args.max_prompt_tokens or 1) < 1 or args.seed < 0:
        raise ValueError("--max-answers and --max-prompt-tokens at least 1, --max-bad-share from 0 to 1, --seed at least 0")
    sampling = {"group_size": args.answers, "max_tokens": args.max_tokens, "temperature": args.temperature}
    changes: dict[str, Any] = {"sampling": {name: value for name, value in sampling.items() if value is not None}}
    if args.max_tokens is not None:
        changes["force_answer"] = {"enabled": False}
    if args.k is not None:
        changes["grading"] = {"k": args.k}
    config = load_grade(args.config, changes)
    # By name, as the command line of `glmv` does: the tools know nothing of the floors that compute.
    models = importlib.import_module("megatron_glmv.rl.grade_models")
    command = importlib.import_module("megatron_glmv.rl.grade_command")
    running = (args.processor, args.dtype, args.max_answers, tuple(args.server))
    plan = command.GradePlan(
        prompts=tuple(args.prompts),
        out=args.out,
        models=tuple(models.Model(folder, *running) for folder in args.model),
        rollouts=tuple(args.rollouts),
        config=config,
        domain=args.domain,
        part=args.part.number,
        num_parts=args.part.count,
        seed=args.seed,
        max_prompt_tokens=args.max_prompt_tokens,
        max_bad_share=args.max_bad_share,
    )
    command.run(plan)
