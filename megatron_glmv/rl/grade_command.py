"""`glmv-data grade`: how hard prompts are for given models, and which of them teach nothing.

Counts of right answers go to disk as they come (`grade_counts`), so a command that was stopped continues, and parts on several
machines share a folder. When every prompt has its counts, the prompts are written again with their grades.

Source: arXiv 2507.01006, section 5.3 (offline grading by pass@k, tiers, dropping of what is trivial or unsolvable).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_glmv.config.grade import GradeConfig
from megatron_glmv.config.prompts import PromptSourceConfig
from megatron_glmv.convert.hf_folder import HfWeights
from megatron_glmv.rl.grade_counts import Count, CountFile, CountFolder, Counts, GradeError, different, read_json, write_json
from megatron_glmv.rl.grade_models import Answering, Model, count_rollouts
from megatron_glmv.rl.grading import TIERS, grade
from megatron_glmv.rl.json_lines import as_line
from megatron_glmv.rl.prompts import PromptFiles
from megatron_glmv.rl.rewards.rewarder import Rewarder
from megatron_glmv.rl.types import Task

ROLLOUTS = "rollouts"
"""Stands for a model where counts come from rollouts files."""
VERDICTS = ("trivial", "unsolvable", "unreadable")


@dataclass(frozen=True)
class GradePlan:
    """What to grade, with what, and where to.

    Attributes:
        prompts: JSONL files, as `glmv rl` reads them.
        out: JSONL file of the prompts that are kept; the dropped ones and a report lie beside it.
        models: to answer with.
        rollouts: files of answers that were judged already; together they count as one more model.
        config: sampling, rewards, rules.
        domain: of prompts that name none.
        part, num_parts: share of the prompts that this run answers.
        seed: of the answers.
        max_prompt_tokens: longest prompt; None: what the models can take.
        max_bad_share: of lines that may be unusable.
    """

    prompts: tuple[Path, ...]
    out: Path
    models: tuple[Model, ...]
    rollouts: tuple[Path, ...]
    config: GradeConfig
    domain: str | None = None
    part: int = 0
    num_parts: int = 1
    seed: int = 0
    max_prompt_tokens: int | None = None
    max_bad_share: float = 0.01

    def beside(self, what: str) -> Path:
        """Path of another output: GRADED.jsonl -> GRADED.what."""
        return self.out.with_name(f"{self.out.name.removesuffix('.jsonl')}.{what}")

    def names(self) -> list[str]:
        """Of the models, in order."""
        return [str(model.folder) for model in self.models] + [ROLLOUTS] * bool(self.rollouts)


def run(plan: GradePlan) -> None:
    """Grade, and print the table; or say what other parts have left to do.

    Raises:
        InputError: prompts, models or settings that cannot be used, or too many answers that could not be judged.
    """
    if not plan.models and not plan.rollouts:
        raise GradeError("nothing to grade with; give --model HF_FOLDER or --rollouts FILE")
    settings = _settings(plan)
    if (report := _finished(plan, settings)) is not None:
        print(f"{plan.out}: is complete", file=sys.stderr)
        _print(plan, report)
        return
    sources = [PromptSourceConfig(path=path, domain=plan.domain) for path in plan.prompts]
    files = PromptFiles(sources, plan.config.rewards, max_bad_share=plan.max_bad_share)
    print(files.describe(), file=sys.stderr)
    folder = CountFolder(plan.beside("partial"), settings)
    started = time.monotonic()
    with folder.open_part(plan.part, plan.num_parts) as sink:
        _count(plan, files, folder.read(), sink)
    with folder.alone():
        report = _finished(plan, settings)
        if report is None:
            counts = folder.read()
            left = len(plan.names()) * len(files.tasks) - len(counts)
            if left:
                part = f"part {plan.part}/{plan.num_parts}"
                print(f"{part} is done; other parts have {left:,} prompts left, and the last one writes {plan.out}")
                return
            report = _write(plan, files, counts) | {"seconds": round(time.monotonic() - started, 1)}
            write_json(plan.beside("report.json"), report | {"settings": settings})
    shutil.rmtree(folder.path, ignore_errors=True)
    _print(plan, report)


def _settings(plan: GradePlan) -> dict[str, Any]:
    """Everything that the output depends on, as JSON; paths may differ between machines, contents may not."""
    sampled = plan.config.model_dump(mode="json", include={"sampling", "force_answer", "grading"})
    rewards = plan.config.rewards.model_dump(mode="json", include={"gates", "domains", "judge", "reward_model"})
    models = []
    for model in plan.models:
        weights = HfWeights(model.folder)  # a wrong folder is refused before anything is sampled
        files = [model.folder / "config.json", *(model.folder / name for name in weights.files)]
        models.append([model.dtype, *([file.name, file.stat().st_size] for file in files)])
    settings = {
        "prompts": [_digest(path) for path in plan.prompts],
        "models": models,
        "rollouts": [_digest(path) for path in plan.rollouts],
        "rewards": rewards,
        **sampled,
        **{name: getattr(plan, name) for name in ("domain", "seed", "max_prompt_tokens", "max_bad_share")},
    }
    return json.loads(json.dumps(settings))


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        raise GradeError(f"{path}: cannot be read ({error.strerror})") from None


def _finished(plan: GradePlan, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of a job that is complete; None where it is not.

    Raises:
        GradeError: the output is something else, or was made with other settings.
    """
    if any(plan.out.resolve() == path.resolve() for path in plan.prompts):
        raise GradeError(f"{plan.out}: is the file of the prompts; give another --out")
    if not plan.out.exists():
        return None
    report = read_json(plan.beside("report.json"))
    if report is None:
        if plan.beside("partial").is_dir():
            return None  # stopped between the last two files
        raise GradeError(f"{plan.out}: exists and is no output of this tool; remove it or choose another --out")
    if keys := different(report.pop("settings", {}), dict(settings)):
        raise GradeError(f"{plan.out}: was made with other settings ({', '.join(keys)}); remove it or choose another --out")
    return report


def _count(plan: GradePlan, files: PromptFiles, known: Counts, sink: CountFile) -> None:
    """Add the counts of this part that are not known, and of prompts some of whose answers could not be judged."""
    own = files.tasks[plan.part :: plan.num_parts]

    def todo(model: int) -> list[Task]:
        found = (known.get((model, task.key)) for task in own)
        return [task for task, count in zip(own, found, strict=True) if count is None or count.masked]

    total = len(own) * len(plan.models)
    work = [todo(number) for number in range(len(plan.models))]
    if plan.models and any(work):
        with (
            Rewarder(plan.config.rewards) as rewarder,
            tqdm(total=total, initial=total - sum(map(len, work)), desc="grade", unit=" prompts", disable=None) as bar,
        ):
            for number, (model, tasks) in enumerate(zip(plan.models, work, strict=True)):
                if tasks:
                    _answer(plan, files, number, model, tasks, rewarder, sink, bar)
    if plan.rollouts:
        number = len(plan.models)
        counts, others = count_rollouts(plan.rollouts, files.tasks)
        if others:
            print(f"rollouts: {others:,} groups of other prompts left out", file=sys.stderr)
        for task in own:
            if (number, task.key) not in known:
                sink.add(number, task.key, counts.get(task.key, Count()))


def _answer(
    plan: GradePlan,
    files: PromptFiles,
    number: int,
    model: Model,
    tasks: Sequence[Task],
    rewarder: Rewarder,
    sink: CountFile,
    bar: tqdm,
) -> None:
    bar.set_description(f"grade {model.folder.name}")
    answering = Answering(model, number, plan.config, files, rewarder, max_prompt_tokens=plan.max_prompt_tokens, seed=plan.seed)
    answers = right = 0
    try:
        for key, count in answering.count(tasks):
            sink.add(number, key, count)
            answers, right = answers + count.answers, right + count.right
            bar.update()
            bar.set_postfix_str(f"right {right / max(1, answers):.0%}, masked {answering.tally.num_masked}", refresh=False)
    finally:
        answering.close()


def _write(plan: GradePlan, files: PromptFiles, counts: Counts) -> dict[str, Any]:
    """Write kept and dropped prompts; returns the report."""
    names, k = plan.names(), plan.config.grading.k
    table: dict[str, Counter[str]] = defaultdict(Counter)
    sums: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"pass_rate": [], "pass_at_k": []})
    dropped = plan.beside("dropped.jsonl")
    partials = [path.with_name(path.name + ".new") for path in (plan.out, dropped)]
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    with partials[0].open("w", encoding="utf-8") as kept_file, partials[1].open("w", encoding="utf-8") as dropped_file:
        for task in files.tasks:
            own = [counts[number, task.key] for number in range(len(names))]
            verdict, grades = _judge(own, plan.config)
            line = _line(plan, files, task) | grades
            line["graded"] = [{"model": name, **_told(count)} for name, count in zip(names, own, strict=True)]
            table[task.domain][verdict if verdict in VERDICTS else grades.get("tier") or "not_graded"] += 1
            for name, key in (("pass_rate", "pass_rate"), ("pass_at_k", f"pass@{k}")):
                if key in grades:
                    sums[task.domain][name].append(grades[key])
            if verdict in VERDICTS:
                reason = next((count.fault for count in own if count.fault), "") if verdict == "unreadable" else ""
                dropped_file.write(as_line(line | {"dropped": verdict} | ({"fault": reason} if reason else {})) + "\n")
            else:
                kept_file.write(as_line(line) + "\n")
    plan.beside("report.json").unlink(missing_ok=True)  # of an earlier job whose output was removed
    partials[1].replace(dropped)
    partials[0].replace(plan.out)
    means = {
        domain: {name: sum(values) / len(values) for name, values in lists.items() if values} for domain, lists in sums.items()
    }
    domains = {domain: {"prompts": found.total(), **found, **means.get(domain, {})} for domain, found in sorted(table.items())}
    return {"tool": "grade", "k": k, "models": names, "domains": domains, "unusable_lines": dict(files.skipped)}


def _told(count: Count) -> dict[str, Any]:
    tree = asdict(count)
    return tree if tree.pop("fault") == "" else {"fault": count.fault}


def _judge(own: Sequence[Count], config: GradeConfig) -> tuple[str, dict[str, Any]]:
    """What becomes of a prompt, and the keys that its line gets."""
    if own and all(count.fault for count in own):
        return "unreadable", {}
    found = grade([(count.answers, count.right) for count in own], config.grading)
    grades: dict[str, Any] = {}
    if found.pass_rate is not None:
        grades |= {"pass_rate": round(found.pass_rate, 6), "tier": found.tier}
    if found.pass_at_k is not None:
        grades[f"pass@{config.grading.k}"] = round(found.pass_at_k, 6)
    return found.verdict, grades


def _line(plan: GradePlan, files: PromptFiles, task: Task) -> dict[str, Any]:
    """A prompt's line with its key, domain, and paths of media that hold beside the new file."""
    folder, tree = files.line(task.key)
    here = plan.out.parent.resolve()
    if folder.resolve() != here:
        for message in tree["messages"]:
            items = message["content"] if isinstance(message["content"], list) else []
            for item in items:
                if item["type"] in ("image", "video"):
                    item[item["type"]] = _moved(item[item["type"]], folder, here)
    return {**tree, "id": task.key, "domain": task.domain}


def _moved(path: str, folder: Path, here: Path) -> str:
    if "://" in path or Path(path).is_absolute():
        return path
    return os.path.relpath(folder.resolve() / path, here)


def _print(plan: GradePlan, report: Mapping[str, Any]) -> None:
    """The table by domain and tier."""
    rows = [("domain", "prompts", "pass rate", f"pass@{report['k']}", *(tier.replace("_", " ") for tier in TIERS), "not graded",
             *(f"{name}, dropped" for name in VERDICTS))]  # fmt: skip
    total: Counter[str] = Counter()
    for domain, found in report["domains"].items():
        numbers = {name: value for name, value in found.items() if name not in ("pass_rate", "pass_at_k")}
        total.update(numbers)
        shares = [f"{found[name]:.1%}" if name in found else "-" for name in ("pass_rate", "pass_at_k")]
        rows.append(_row(domain, numbers, shares))
    if len(report["domains"]) > 1:
        rows.append(_row("all", total, ["", ""]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    lost = sum(total[name] for name in VERDICTS)
    print(f"{total['prompts'] - lost:,} prompts in {plan.out}, {lost:,} in {plan.beside('dropped.jsonl')}")
    if unusable := report["unusable_lines"]:
        listed = ", ".join(f"{reason} {count:,}" for reason, count in unusable.items())
        print(f"{sum(unusable.values()):,} lines could not be used and are in neither: {listed}")


def _row(name: str, numbers: Mapping[str, int], shares: Sequence[str]) -> tuple[str, ...]:
    columns = (*TIERS, "not_graded", *VERDICTS)
    return (name, f"{numbers['prompts']:,}", *shares, *(f"{numbers.get(column, 0):,}" for column in columns))
