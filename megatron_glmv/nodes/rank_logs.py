"""``glmv errors``: what ended a job, from the logs of its ranks, on one page with the first error on top.

Every rank of a run that dies writes a traceback, and most of them only say that a peer has gone. What is reported first is the
error of a rank that did not lose another, the earliest by the time of its log; a rank that was killed leaves no word of its
own, so what its agent says of the signal counts, too.

Source: folders as torchrun 2.13 makes them, NODE/RUN_ID/attempt_N/LOCAL_RANK/stderr.log, under the agent's own agent.log
(examples/slurm/node.sh).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_glmv.config.base import InputError

TAIL_LINES = 30
_CONSEQUENCE = re.compile(
    r"lost contact|because rank \d+ failed|Connection closed by peer|Connection reset|SIGTERM|SignalException"
)
_ENDED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")
_ERROR = re.compile(
    r"^(glmv: error: .*|\w[\w.]*(Error|Exception|Interrupt)\b.*|Fatal Python error.*|no progress for .*|.*out of memory.*)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class RankError:
    """One rank's or agent's last words."""

    when: float
    """Seconds since the epoch when the log was last written."""
    where: str
    line: str
    tail: tuple[str, ...]
    consequence: bool
    """Whether it only says that another has gone."""


def summarize(folder: Path) -> str:
    """The page; the first error with the end of its log, then a line for each other one.

    Args:
        folder: the logs of one launch, or of a whole run.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder of logs; they lie in RUN_FOLDER/logs")
    errors = sorted(find_errors(folder), key=lambda error: (error.consequence, error.when, error.where))
    if not errors:
        return f"no rank under {folder} has left an error"
    first, *others = errors
    lines = [f"first error: {first.where}", f"  {first.line}", "", *(f"  | {line}" for line in first.tail)]
    if others:
        lines += ["", f"{len(others)} more, in order:"]
        lines += [f"  {error.where}: {error.line}" for error in others[:200]]
    return "\n".join(lines)


def find_errors(folder: Path) -> Iterator[RankError]:
    """Every log that holds an error, in no order."""
    for path in folder.rglob("stderr.log"):
        text = path.read_text(encoding="utf-8", errors="replace")
        found = [match.group(0) for match in _ERROR.finditer(text)]
        if found:
            attempt, local_rank = path.parent.parent.name, path.parent.name
            node = path.relative_to(folder).parts[-5] if len(path.relative_to(folder).parts) >= 5 else folder.name
            where = f"node {node}, local rank {local_rank}, {attempt.replace('_', ' ')} ({path})"
            yield _error(path, where, found[-1], text)
    for path in folder.rglob("agent.log"):
        text = path.read_text(encoding="utf-8", errors="replace")
        for code, local_rank, process in (match.groups() for match in _ENDED.finditer(text)):
            where = f"node {path.parent.name}, local rank {local_rank} ({path})"
            # A rank that ended by itself has said why, in its own log or through a peer.
            killed = code.startswith("-")
            line = f"process {process} " + (f"was killed by signal {code[1:]}" if killed else f"ended with exit code {code}")
            yield RankError(path.stat().st_mtime, where, line, (), not killed)


def _error(path: Path, where: str, line: str, text: str) -> RankError:
    tail = tuple(text.rstrip().splitlines()[-TAIL_LINES:])
    return RankError(path.stat().st_mtime, where, line[:300], tail, bool(_CONSEQUENCE.search(line)))
