"""Arms of reinforcement learning against each other at equal numbers of sampled answers: one table, one picture.

    python benchmarks/rl_ablation.py FILE.yaml --out FOLDER --arms rlcs grpo dapo --seeds 0 1 2 --parallel 2 steps=200

Every arm and seed is a `glmv rl` of its own in FOLDER/ARM/seed-N, with its file and its log beside it. The budget is what plain
GRPO samples in `steps` iterations: steps x prompts_per_step x group_size. An arm that rolls out more prompts than it trains on
spends it in fewer iterations, and is stopped at its first evaluation beyond it. So no arm gains by sampling more, and what they
reach is read off at the same number of rollouts. docs/rl.md, "Ablations", describes the arms.

The same command again runs what is missing, continues what was killed, and writes FOLDER/ablation.md, .json and .png anew.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rl_ablation_table as table
import yaml

from megatron_glmv.config.base import ConfigError, InputError, load_tree, merge, parse_override, read_yaml, validate
from megatron_glmv.config.rl_stage import RlConfig
from megatron_glmv.run_folder.figures import format_duration
from megatron_glmv.run_folder.metrics_file import METRICS_FILE
from megatron_glmv.training.progress import ProgressLine

ARMS: dict[str, tuple[str, ...]] = {
    "rlcs": (),
    "grpo": ("curriculum.enabled=false", "expansion.enabled=false"),
    "dapo": ("curriculum.enabled=false", "expansion.enabled=true", "expansion.method=waves"),
    "no-curriculum": ("curriculum.enabled=false",),
    "no-expansion": ("expansion.enabled=false",),
    "symmetric-clip": ("algorithm.clip_high=${clip_low}",),
}
"""What each arm changes in the file; `${clip_low}` is the file's algorithm.clip_low."""
DEFAULT_ARMS = ("rlcs", "grpo", "dapo", "no-curriculum", "no-expansion")
ONE_DOMAIN = "one-domain:"
POLL_S = 2.0
"""Seconds between looks at the runs."""
STOP_S = 20.0
"""Seconds that a run has to end before it is killed."""


@dataclass(frozen=True)
class Arm:
    """One column of switches.

    Attributes:
        name: in table and picture.
        overrides: `a.b=value` over the file.
        domain: the only one whose prompts are drawn; None: all.
    """

    name: str
    overrides: tuple[str, ...]
    domain: str | None = None

    @property
    def folder(self) -> str:
        """Its name on the disk."""
        return self.name.replace(":", "-")


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        arm: its name.
        seed: of the run.
        file: the YAML it is started with; log and run folder lie beside it.
        config: what the file says.
        budget: sampled answers after which it may be stopped.
    """

    arm: str
    seed: int
    file: Path
    config: RlConfig
    budget: int

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.file.with_suffix(".log")

    def curve(self) -> table.Curve:
        """What it has recorded so far."""
        return table.read_curve(self.config.run_folder / METRICS_FILE, self.config.sampling.group_size)

    def is_done(self) -> bool:
        """Whether the held-out prompts were answered at the end of the budget, or after the last iteration."""
        curve = self.curve()
        return self.has_spent(curve) or (len(curve.eval_steps) > 1 and curve.eval_steps[-1] >= self.config.steps)

    def has_spent(self, curve: table.Curve) -> bool:
        """Whether an evaluation lies beyond the budget."""
        return len(curve.eval_steps) > 1 and bool(curve.eval_rollouts[-1] >= self.budget)


def parse_arm(text: str, clip_low: float) -> Arm:
    """An arm by its name, `one-domain:NAME`, or `name=key=value,key=value`.

    Raises:
        ConfigError: none of these.
    """
    name, given, overrides = text.partition("=")
    if given:
        if "=" not in overrides:
            raise ConfigError(f"--arms {text}: an arm of your own is name=key=value; overrides for all arms stand beside FILE")
        if name in ARMS or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise ConfigError(f"--arms {text}: {name!r} cannot be its name; use letters, digits and - for a new one")
        # A comma within a value, as in a list, is not followed by a key.
        return Arm(name, tuple(re.split(r",(?=[A-Za-z_][\w.]*=)", overrides)))
    if name.startswith(ONE_DOMAIN) and len(name) > len(ONE_DOMAIN):
        return Arm(name, (), name.removeprefix(ONE_DOMAIN))
    if name not in ARMS:
        raise ConfigError(f"--arms {text}: no such arm; use {', '.join(ARMS)}, {ONE_DOMAIN}NAME or name=key=value,key=value")
    return Arm(name, tuple(override.replace("${clip_low}", str(clip_low)) for override in ARMS[name]))


def base_tree(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The file with what all arms share; what a comparison needs and the file leaves out is filled in.

    Raises:
        ConfigError: it is not a configuration of `glmv rl`.
    """
    given = merge(load_tree([file], overrides), {"run_folder": "each its own"})
    config = validate(RlConfig, given, str(file))
    tree = merge({"rollouts_every_steps": 0, "checkpoint": {"every_steps": max(1, config.steps // 10)}}, given)
    if not config.evaluation.every_steps:
        tree = merge(tree, {"evaluation": {"every_steps": max(1, config.steps // 20)}})
    validate(RlConfig, tree, str(file)).check()
    return tree


def arm_tree(tree: Mapping[str, Any], arm: Arm, out: Path) -> dict[str, Any]:
    """The configuration of an arm; the prompts of a single domain are written to out/prompts.

    Raises:
        ConfigError: an override does not fit, or the domain has no prompt.
    """
    changed = dict(tree)
    for override in arm.overrides:
        changed = merge(changed, parse_override(override))
    config = validate(RlConfig, changed, f"arm {arm.name}")
    config.check()
    if arm.domain is None:
        return changed
    sources = []
    for number, source in enumerate(config.prompts.sources):
        lines = only_domain(source.path, source.domain, arm.domain)
        if lines:
            path = out / "prompts" / arm.folder / f"{number}-{source.path.name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines), encoding="utf-8")
            sources.append(source.model_dump(mode="json") | {"path": str(path)})
    if not sources:
        raise ConfigError(f"--arms {arm.name}: prompts.sources hold no prompt of this domain; check its name")
    changed["prompts"] = changed["prompts"] | {"sources": sources}
    if curriculum := changed.get("curriculum"):  # proportions of domains without prompts are refused
        kept = {key: {arm.domain: curriculum[key][arm.domain]} if arm.domain in (curriculum.get(key) or {}) else {}
                for key in ("domains", "subcategories")}  # fmt: skip
        changed["curriculum"] = curriculum | kept
    return changed


def only_domain(path: Path, default: str | None, domain: str) -> list[str]:
    """The lines of a file of prompts that are of a domain, paths of media made absolute.

    Raises:
        ConfigError: the file cannot be read.
    """
    folder, kept = path.resolve().parent, []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); prompts.sources names JSONL files") from None
    for line in lines:
        try:
            tree = json.loads(line)
        except ValueError:
            continue
        if isinstance(tree, dict) and tree.get("domain", default) == domain:
            for item in _items(tree.get("messages")):
                kind = item.get("type")
                if kind in ("image", "video") and isinstance(item.get(kind), str) and "://" not in item[kind]:
                    item[kind] = str(folder / item[kind])
            kept.append(json.dumps(tree, ensure_ascii=False) + "\n")
    return kept


def _items(messages: Any) -> Iterator[dict[str, Any]]:
    """Texts and media of a conversation, as far as it is one."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        yield from (item for item in content if isinstance(item, dict)) if isinstance(content, list) else ()


def plan(tree: Mapping[str, Any], arms: Sequence[Arm], seeds: Sequence[int], out: Path) -> list[Run]:
    """Every arm with every seed, one seed after the other, their files written.

    Raises:
        ConfigError: an arm or seed twice, or a folder that holds a run with other settings.
    """
    if len({arm.folder for arm in arms}) != len(arms) or len(set(seeds)) != len(seeds):
        raise ConfigError("--arms, --seeds: one is named twice")
    found, trees = [], {arm.name: arm_tree(tree, arm, out) for arm in arms}
    for seed in seeds:
        for arm in arms:
            file = out / arm.folder / f"seed-{seed}.yaml"
            own = json.loads(json.dumps(trees[arm.name] | {"seed": seed, "run_folder": str(file.with_suffix(""))}))
            if file.exists() and (key := _first_difference(read_yaml(file), own)):
                raise ConfigError(f"{file}: was started with another {key}; choose another --out, or remove {file.parent}")
            found.append((arm.name, file, own, validate(RlConfig, own, f"arm {arm.name}, seed {seed}")))
    for _, file, own, _ in found:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(own, sort_keys=False, allow_unicode=True), encoding="utf-8")
    # The smallest: an arm of the user may have other sizes.
    budget = min(config.steps * config.sampling.prompts_per_step * config.sampling.group_size for *_, config in found)
    return [Run(arm, config.seed, file, config, budget) for arm, file, _, config in found]


def _first_difference(old: Any, new: Any, key: str = "") -> str:
    """The key at which two trees differ; empty where they do not."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = (_first_difference(old.get(name), new.get(name), f"{key}.{name}".strip(".")) for name in {**old, **new})
        return next(filter(None, found), "")
    return "" if old == new else key


def run_all(runs: Sequence[Run], parallel: int, ranks: int) -> list[Run]:
    """Run what is not done, `parallel` at a time; returns those that failed.

    Raises:
        ConfigError: a run of an earlier command still goes on.
    """
    line, waiting, failed = ProgressLine(), [run for run in runs if not run.is_done()], list[Run]()
    active: dict[Path, tuple[Run, subprocess.Popen[bytes]]] = {}
    total, began = len(waiting), time.monotonic()
    first = {run.file: run.curve().num_rollouts for run in waiting}
    sampled = dict(first)
    line.note(f"{len(runs) - total} of {len(runs)} runs are done")
    try:
        while waiting or active:
            while waiting and len(active) < parallel:
                run = waiting.pop(0)
                active[run.file] = run, _start(run, parallel, ranks)
            time.sleep(POLL_S)
            for file, (run, process) in list(active.items()):
                code, curve = process.poll(), run.curve()
                sampled[file] = curve.num_rollouts
                if code is None and run.has_spent(curve) and curve.steps[-1] < run.config.steps:
                    _stop(process)
                elif code is None:
                    continue
                del active[file]
                if code:
                    failed.append(run)
                    line.note(f"{run.arm}, seed {run.seed} failed with exit code {code}: {_last_line(run.log)} ({run.log})")
                else:
                    line.note(f"{run.arm}, seed {run.seed} is done: {curve.describe()}")
            todo = [*(run for run, _ in active.values()), *waiting]
            rest = sum(max(run.budget - sampled[run.file], 0) for run in todo)
            done = sum(max(sampled[file] - first[file], 0) for file in first)
            left_s = rest * (time.monotonic() - began) / done if done else math.inf
            states = [f"{run.arm}/{run.seed} {min(sampled[file] / run.budget, 1):.0%}" for file, (run, _) in active.items()]
            text = f"{total - len(todo)}/{total} runs | {', '.join(states) or '-'} | {format_duration(left_s)} left"
            line.show(text, important=not todo)
    finally:
        for _, process in active.values():
            _stop(process)
        line.close()
    return failed


def _start(run: Run, parallel: int, ranks: int) -> subprocess.Popen[bytes]:
    """Start a run in a process group of its own; its log stays locked as long as one of its processes lives."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // (parallel * ranks)))
    with run.log.open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{run.log}: the run is still going, from an earlier command; end it first") from None
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_glmv", "rl", str(run.file), "--ranks", str(ranks)],
            env=os.environ | {"OMP_NUM_THREADS": threads},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a run that has done what is needed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it printed nothing"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1")
    return int(text)


def main(words: Sequence[str] | None = None) -> int:
    """Run the arms and write the table; 1 if a run failed, 2 if the command cannot be used."""
    first, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a configuration of glmv rl")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=value", help="over the file, for all arms")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of the table")
    arms_help = f"{', '.join(ARMS)}, {ONE_DOMAIN}NAME, or name=key=value,key=value (default: {' '.join(DEFAULT_ARMS)})"
    parser.add_argument("--arms", nargs="+", default=list(DEFAULT_ARMS), help=arms_help)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parallel", type=_count, default=1, help="runs at a time")
    parser.add_argument("--ranks", type=_count, default=1, help="ranks of each run")
    parser.add_argument("--target", nargs="+", type=float, help="accuracies, 0 to 1, whose number of rollouts is wanted")
    arguments = parser.parse_intermixed_args(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that runs are ended too
    try:
        tree = base_tree(arguments.file, arguments.overrides)
        config = validate(RlConfig, tree)
        arms = [parse_arm(text, config.algorithm.clip_low) for text in arguments.arms]
        runs = plan(tree, arms, arguments.seeds, arguments.out.resolve())
        failed = run_all(runs, arguments.parallel, arguments.ranks)
        curves = {arm.name: {run.seed: run.curve() for run in runs if run.arm == arm.name and run.is_done()} for arm in arms}
        if not any(curves.values()):
            raise ConfigError(f"{arguments.out}: no run is done, so there is no table; the logs beside them say why")
        result = table.compare({name: found for name, found in curves.items() if found}, runs[0].budget, arguments.target)
        changes = {arm.name: f"prompts of {arm.domain} only" if arm.domain else " ".join(arm.overrides) for arm in arms}
        table.write(result, curves, config, changes, arguments.out)
    except InputError as error:
        print(f"rl_ablation: error: {error}", file=sys.stderr)
        return 2
    print((arguments.out / "ablation.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
