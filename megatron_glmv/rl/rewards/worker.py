"""One process that runs gates and verifiers on what a model wrote: JSON lines in, JSON lines out.

It has its own address space limit and, before every answer, sets an alarm whose default action ends it: a runaway stops even if
the process that started it is gone. It never sees the judge's token, and loads neither torch nor HTTP.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

from megatron_glmv.config.rewards import RewardsConfig
from megatron_glmv.rl.rewards.extraction import Refused
from megatron_glmv.rl.rewards.gates import pass_gates
from megatron_glmv.rl.rewards.registry import settings_of, verifier_of
from megatron_glmv.rl.rewards.verifiers.base import BadReference, Question
from megatron_glmv.rl.types import Reward, Task

ALARM_AFTER_TIMEOUT_S = 1.0
"""How much later than the parent the process ends itself."""


def judge_response(task: Task, text: str, config: RewardsConfig) -> Reward | Question:
    """Gates, then the verifier: everything but asking somebody else.

    Args:
        task: what was asked.
        text: the response as sampled, special tokens kept.
        config: gates and domains.

    Returns:
        The reward, or what to ask. A task that cannot be judged is masked with reason reference, a fault of ours with error.
    """
    try:
        settings = settings_of(task, config)
        reference = task.answer if isinstance(task.answer, str) else ""
        response = pass_gates(text, config.gates, settings.box, reference)
        return verifier_of(settings).verify(task, response.final)
    except Refused as refused:
        return Reward(refused.value, False, refused.reason, str(refused))
    except BadReference as error:
        return Reward(None, None, "reference", f"{task.key}: {error}")
    except Exception as error:  # noqa: BLE001 - whatever a text broke: masked, counted, never a reward
        return Reward(None, None, "error", f"{task.key}: {type(error).__name__}: {str(error)[:200]}")


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer lines until the source ends; the first line holds the settings."""
    config = RewardsConfig.model_validate(json.loads(source.readline()))
    size = int(config.memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sink.write(b"ready\n")
    sink.flush()
    for line in source:
        signal.setitimer(signal.ITIMER_REAL, config.timeout_s + ALARM_AFTER_TIMEOUT_S)
        request = json.loads(line)
        outcome = judge_response(Task(**{**request["task"], "media": tuple(request["task"]["media"])}), request["text"], config)
        reply = json.dumps(pack(outcome)).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        sink.write(reply + b"\n")
        sink.flush()


def pack(outcome: Reward | Question) -> dict[str, Any]:
    """An outcome as JSON can hold it."""
    return {"kind": type(outcome).__name__, **dataclasses.asdict(outcome)}


def unpack(tree: Mapping[str, Any]) -> Reward | Question:
    """What `pack` packed."""
    fields = {key: value for key, value in tree.items() if key != "kind"}
    if tree["kind"] == "Reward":
        return Reward(**fields)
    return Question(**{**fields, "without": Reward(**fields["without"]), "media": tuple(fields["media"])})


def main() -> None:
    """The process: replies go to the standard output, which nothing else may write to."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from the keyboard; the parent ends this process
    serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
