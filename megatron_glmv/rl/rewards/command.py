"""`glmv reward`: score answers in a file, print the table of each domain, and keep every score with its reason.

What is scored is written at once, so that an interrupted command continues where it stopped; answers that could not be judged
are asked about again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from megatron_glmv.config.base import InputError
from megatron_glmv.config.rewards import RewardsConfig
from megatron_glmv.rl.json_lines import as_line
from megatron_glmv.rl.rewards.registry import settings_of
from megatron_glmv.rl.rewards.rewarder import Rewarder
from megatron_glmv.rl.rewards.tally import Tally
from megatron_glmv.rl.rewards.verifiers.base import BadReference
from megatron_glmv.rl.types import Reward, Task

OK, FAILED, INTERRUPTED = 0, 1, 130
EARLY_CHECK = 50
"""Answers after which the share of masked ones is looked at while the command goes on."""
_AHEAD = 4
"""Responses handed over ahead of the results, for each process and each question under way."""
_OPTIONAL: Mapping[str, tuple[type, Any]] = {
    "key": (str, ""),
    "subcategory": (str, ""),
    "options": (dict, {}),
    "media": (list, []),
}


@dataclass(frozen=True)
class Line:
    """One answer of the file.

    Attributes:
        number: 1-based line.
        tree: the whole line.
        task, response: what to judge.
        digest: of the line and the settings; equal digests have equal rewards.
    """

    number: int
    tree: dict[str, Any]
    task: Task
    response: str
    digest: str


class BadLine(InputError):
    """A line of the file cannot be scored."""


def run(file: Path, config: RewardsConfig, out: Path | None = None) -> int:
    """Score the answers of a file and print the table.

    Args:
        file: JSONL; each line has domain, answer (the reference) and response, usually question; optionally key, subcategory,
            options, media. Other keys are kept.
        config: gates, domains, judge, reward model.
        out: file of scores, the same lines with a key reward; None: beside `file`, as NAME.scored.jsonl.

    Returns:
        Exit code: 0 scored, 1 no line could be scored, 130 interrupted.

    Raises:
        InputError: a file cannot be read or written, or too many answers could not be judged.
    """
    out = out or file.with_name(file.name.removesuffix(".jsonl") + ".scored.jsonl")
    if out.exists() and out.samefile(file):
        raise InputError(f"{out}: the scores would overwrite the answers; give another --out")
    lines, faults = read_lines(file, config)
    for fault in faults:
        print(f"{file}:{fault}", file=sys.stderr)
    if not lines:
        raise InputError(f"{file}: no line can be scored ({len(faults)} bad lines); each needs domain, answer, response")
    partial = out.with_name(out.name + ".part")
    rewards = _kept(out, partial)
    done = {line.digest: rewards[line.digest] for line in lines if line.digest in rewards}
    kept = [line for line in lines if line.digest in done]
    todo = [line for line in lines if line.digest not in done]
    if done:
        print(f"{out}: {len(lines) - len(todo):,} of {len(lines):,} answers are scored already", file=sys.stderr)
    started = time.monotonic()
    meters: dict[str, float] = {}
    try:
        with partial.open("a", encoding="utf-8") as sink:
            meters = _score(todo, kept, config, done, sink)
    except KeyboardInterrupt:
        print(f"interrupted; {partial} holds what is scored, and the same command continues", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        raise InputError(f"{partial}: cannot be written ({error.strerror})") from None
    _finish(out, partial, lines, done)
    _report(lines, done, faults, meters, len(todo), time.monotonic() - started)
    print(f"scores in {out}")
    return OK


def read_lines(file: Path, config: RewardsConfig) -> tuple[list[Line], list[str]]:
    """The lines that can be scored, and what is wrong with the others ("12: no key response").

    Raises:
        InputError: the file cannot be read.
    """
    settings = config.model_dump_json(include={"gates", "domains", "judge", "reward_model"})
    lines, faults = [], []
    try:
        with file.open("rb") as source:
            for number, data in enumerate(source, 1):
                if not data.strip():
                    continue
                digest = hashlib.sha256(settings.encode() + data.strip()).hexdigest()[:32]
                try:
                    lines.append(_line(number, data, digest, config))
                except BadLine as error:
                    faults.append(f"{number}: {error}")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    return lines, faults


def _line(number: int, data: bytes, digest: str, config: RewardsConfig) -> Line:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        raise BadLine("not JSON") from None
    if not isinstance(tree, dict):
        raise BadLine("not a JSON object")
    for key in ("domain", "response"):
        if not isinstance(tree.get(key), str):
            raise BadLine(f"no text under the key {key}" if key in tree else f"no key {key}")
    if not isinstance(tree.get("question", ""), str):
        raise BadLine("the key question holds no text")
    if tree.get("answer") is None and tree["domain"] not in config.domains:
        raise BadLine("no key answer")
    for key, (kind, _) in _OPTIONAL.items():
        if key in tree and not isinstance(tree[key], kind):
            raise BadLine(f"the key {key} holds no {kind.__name__}")
    extra = {key: tree.get(key, default) for key, (_, default) in _OPTIONAL.items()}
    extra["media"] = tuple(map(str, extra["media"]))
    extra["key"] = extra["key"] or f"line {number}"
    task = Task(domain=tree["domain"], question=tree.get("question", ""), answer=tree.get("answer"), **extra)
    try:
        needs_answer = getattr(settings_of(task, config), "verifier", "") != "general"
    except BadReference as error:
        raise BadLine(str(error)) from None
    if task.answer is None and needs_answer:
        raise BadLine("no key answer")
    return Line(number, tree, task, tree["response"], digest)


def _kept(*files: Path) -> dict[str, Reward]:
    """Rewards of an earlier run, by digest; masked ones left out, so that they are tried again."""
    rewards = {}
    for file in files:
        if not file.exists():
            continue
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                tree = json.loads(text)["reward"]
                digest, reward = tree["digest"], Reward(**{key: tree[key] for key in ("value", "correct", "reason", "detail")})
            except (ValueError, TypeError, KeyError):
                if not file.name.endswith(".part"):
                    raise InputError(f"{file}:{number}: not a file of scores; give another --out") from None
                continue  # the line that was being written when the run stopped
            if reward.value is not None:
                rewards[digest] = reward
    return rewards


def _score(
    lines: Sequence[Line], kept: Sequence[Line], config: RewardsConfig, done: dict[str, Reward], sink: TextIO
) -> dict[str, float]:
    """Judge `lines`, add to `done`, where those of `kept` are already, and write each at once; returns the meters."""
    if not lines:
        return {}
    tally = Tally()
    for line in kept:
        tally.add(line.task.domain, done[line.digest])
    with Rewarder(config) as rewarder, tqdm(total=len(lines), desc="reward", unit=" answers", disable=None) as bar:
        for line, reward in _results(lines, rewarder, _ahead(config)):
            done[line.digest] = reward
            sink.write(json.dumps({"reward": {**asdict(reward), "digest": line.digest}}) + "\n")
            sink.flush()
            tally.add(line.task.domain, reward)
            bar.update()
            if tally.num_masked:
                bar.set_postfix_str(f"{tally.num_masked} masked")
            if tally.num_answers == EARLY_CHECK:
                tally.check(config.max_masked_share)
        tally.check(config.max_masked_share)
        return rewarder.meters()


def _ahead(config: RewardsConfig) -> int:
    asked = (config.judge, config.reward_model)
    return _AHEAD * (config.workers + sum(client.concurrency for client in asked if client is not None))


def _results(lines: Sequence[Line], rewarder: Rewarder, ahead: int) -> Iterator[tuple[Line, Reward]]:
    """Results as they come, with a bounded number under way."""
    rest = iter(lines)
    under_way: dict[Future[Reward], Line] = {}
    while True:
        for line in rest:
            under_way[rewarder.submit(line.task, line.response)] = line
            if len(under_way) >= ahead:
                break
        if not under_way:
            return
        for future in wait(under_way, return_when=FIRST_COMPLETED).done:
            yield under_way.pop(future), future.result()


def _finish(out: Path, partial: Path, lines: Sequence[Line], done: Mapping[str, Reward]) -> None:
    """Write all scores in the order of the file, then drop the working copy."""
    ordered = out.with_name(out.name + ".new")
    try:
        with ordered.open("w", encoding="utf-8") as sink:
            for line in lines:
                reward = {**asdict(done[line.digest]), "line": line.number, "digest": line.digest}
                sink.write(as_line({**line.tree, "reward": reward}) + "\n")
        ordered.replace(out)
        partial.unlink()
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from None


def _report(
    lines: Sequence[Line],
    done: Mapping[str, Reward],
    faults: Sequence[str],
    meters: Mapping[str, float],
    num_new: int,
    seconds: float,
) -> None:
    tally = Tally()
    for line in lines:
        tally.add(line.task.domain, done[line.digest])
    print("\n".join(tally.lines()))
    print(f"{num_new:,} answers scored in {seconds:.1f} s" + (f"; {len(faults):,} bad lines left out" if faults else ""))
    for name in ("judge", "reward_model"):
        found = {key.partition("/")[2]: value for key, value in meters.items() if key.startswith(f"{name}/")}
        if found:
            print(
                f"{name}: {found['requests']:,.0f} requests, {found['retries']:,.0f} retries, "
                f"{found['failures']:,.0f} failures, {found['cache_hits']:,.0f} from the cache, "
                f"{found['tokens_in']:,.0f} tokens in, {found['tokens_out']:,.0f} out, cost {found['cost']:.4g}"
            )
