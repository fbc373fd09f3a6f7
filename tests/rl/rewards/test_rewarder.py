"""The processes, the judge and the rewarder together: runaways, crashes, masked shares, order, where secrets go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from megatron_glmv.config.base import validate
from megatron_glmv.config.rewards import RewardsConfig
from megatron_glmv.rl.rewards.judge import Judge
from megatron_glmv.rl.rewards.pool import VerifierPool, WorkerFailed
from megatron_glmv.rl.rewards.rewarder import Rewarder
from megatron_glmv.rl.rewards.tally import JudgeDown, Tally, TooManyMasked
from megatron_glmv.rl.types import Reward, Task
from megatron_glmv.run_folder.refusal import Outage
from tests.rl.rewards.conftest import JudgeServer

# A real worker whose counting verifier misbehaves on some answers, as a faulty verifier would.
WORKER = """
import os, sys, time
from megatron_glmv.rl.rewards import worker
from megatron_glmv.rl.rewards.verifiers.counting import CountingVerifier
from megatron_glmv.rl.types import Reward
usual = CountingVerifier.compare
def compare(self, task, answer):
    if answer == "111":
        9 ** 9 ** 9  # in C: no signal handler of Python's would run
    if answer == "222":
        os._exit(3)
    if answer == "333":
        os.write(1, b"not what was asked\\n")
        print("a stray print")
    if answer == "444":
        return Reward(0.0, False, "wrong", str(len(bytes(5 * 2**30))))
    if answer == "555":
        return Reward(0.0, False, "wrong", os.environ.get("MY_TOKEN", "no token"))
    if answer == "666":
        raise TypeError("unexpected keyword argument")
    return usual(self, task, answer)
CountingVerifier.compare = compare
worker.main()
"""


def task(domain: str = "counting", reference: Any = "3", **options: Any) -> Task:
    return Task("k", domain, "How many?", reference, options=options)


def boxed(answer: object) -> str:
    return f"<think>hm</think><answer><|begin_of_box|>{answer}<|end_of_box|></answer>"


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    os.environ["MY_TOKEN"] = "s3cret"
    tree = {"workers": 1, "timeout_s": 0.5, "judge": {"endpoints": [{"token_env": "MY_TOKEN"}]}}
    with VerifierPool(validate(RewardsConfig, tree), (sys.executable, "-c", WORKER)) as started:
        yield started
    del os.environ["MY_TOKEN"]


@pytest.mark.parametrize(
    ("answer", "value", "reason"),
    [("111", None, "timeout"), ("222", None, "error"), ("333", 0.0, "wrong"), ("444", None, "error"), ("666", None, "error")],
)
def test_what_a_faulty_verifier_does_costs_one_answer(pool: VerifierPool, answer: str, value: float | None, reason: str):
    outcome = pool.submit(task(), boxed(answer)).result(30)
    assert (outcome.value, outcome.reason) == (value, reason)
    assert (outcome.correct is None) == (value is None)
    assert pool.submit(task(), boxed("3")).result(30).value == 1.0


def test_the_judges_token_does_not_reach_the_verifiers(pool: VerifierPool):
    assert pool.submit(task(), boxed("555")).result(30).detail == "no token"


def test_a_runaway_does_not_hold_up_the_others():
    config = validate(RewardsConfig, {"workers": 2, "timeout_s": 0.6})
    with VerifierPool(config, (sys.executable, "-c", WORKER)) as started:
        [future.result(30) for future in [started.submit(task(), boxed("3")) for _ in range(8)]]
        stuck = started.submit(task(), boxed("111"))
        others = [started.submit(task(), boxed("3")) for _ in range(50)]
        assert [future.result(30).value for future in others] == [1.0] * 50
        assert not stuck.done()
        assert stuck.result(30).reason == "timeout"


def test_a_worker_ends_itself_when_nobody_is_left():
    """The parent is gone while the worker computes: its own alarm ends it."""
    config = validate(RewardsConfig, {"timeout_s": 0.05})
    process = subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    asked = {"task": {"key": "k", "domain": "counting", "question": "", "answer": "3", "media": []}, "text": boxed(111)}
    request = json.dumps(asked) + "\n"
    process.stdin.write(config.model_dump_json().encode() + b"\n" + request.encode())
    process.stdin.flush()
    assert process.wait(20) < 0
    process.stdin.close()
    process.stdout.close()


def test_a_worker_that_does_not_start_is_a_fault():
    with VerifierPool(RewardsConfig(workers=1), (sys.executable, "-c", "")) as started, pytest.raises(WorkerFailed):
        started.submit(task(), boxed("3")).result(30)


def test_closing_at_once_cancels_what_waits():
    config = validate(RewardsConfig, {"workers": 1, "timeout_s": 30})
    started = VerifierPool(config, (sys.executable, "-c", WORKER))
    futures = [started.submit(task(), boxed(answer)) for answer in ("3", "111", "3", "3")]
    assert futures[0].result(30).value == 1.0
    time.sleep(0.05)
    start = time.monotonic()
    started.close(finish=False)
    assert time.monotonic() - start < 5
    assert futures[-1].cancelled()


@pytest.fixture(scope="module")
def rewarder() -> Iterator[Rewarder]:
    with Rewarder(RewardsConfig(workers=1)) as made:
        yield made


def test_a_batch_keeps_its_order(rewarder: Rewarder):
    batch = [(task(reference=str(n % 3)), boxed(n % 5)) for n in range(60)]
    assert [reward.value for reward in rewarder.score(batch)] == [float(n % 3 == n % 5) for n in range(60)]


def test_tasks_of_any_kind_reach_the_verifiers_or_are_masked(rewarder: Rewarder):
    boxes = task("grounding", np.array([[0, 0, 10, 10]]))
    read_only = Task("k", "math", "?", "100.5", options=MappingProxyType({"tolerance": 0.1}))
    strange = task("math", object())
    values = [rewarder.submit(boxes, boxed("[0,0,10,10]")), rewarder.submit(read_only, boxed("101"))]
    assert [future.result(30).value for future in values] == [1.0, 1.0]
    assert rewarder.submit(strange, boxed("1")).result(30).reason == "reference"
    assert rewarder.submit(task(), boxed("\ud800")).result(30).value == 0.0


def test_a_fault_of_the_judge_is_masked(monkeypatch: pytest.MonkeyPatch):
    def broken(self: Judge, question: object) -> Reward:
        raise TypeError("Bearer s3cret")

    monkeypatch.setattr(Judge, "ask", broken)
    with Rewarder(validate(RewardsConfig, {"workers": 1, "judge": {}})) as made:
        reward = made.submit(task("vqa", "cat"), boxed("dog")).result(30)
    assert (reward.value, reward.reason) == (None, "error")
    assert "s3cret" not in reward.detail


def test_without_a_judge_the_rules_decide_and_what_needs_one_is_masked(rewarder: Rewarder):
    assert rewarder.submit(task("vqa", "cat"), boxed("dog")).result(30).value == 0.0
    masked = rewarder.submit(task("long_document", "a cat"), boxed("a dog")).result(30)
    assert (masked.value, masked.reason) == (None, "no_judge")


def test_too_many_masked_answers_stop_with_one_line(rewarder: Rewarder):
    batch = [(task(), boxed("3"))] * 2 + [(task("geo", "Paris"), boxed("Lyon"))] * 2
    with pytest.raises(
        TooManyMasked, match=r"^rewards: 2 of 4 answers could not be judged, more than max_masked_share 0.25: no_judge 2; "
    ) as stopped:
        rewarder.score(batch)
    assert "\n" not in str(stopped.value)
    assert len(rewarder.score(batch[:2])) == 2


def test_the_judge_is_asked_for_what_the_rules_leave_open(judge_server: JudgeServer, tmp_path: Path):
    own = tmp_path / "own.txt"
    own.write_text("OWN {question} {reference} {answer}")
    judge_server.delay_s = 0.02

    def reply(body: dict, number: int) -> str | bytes:
        if "question" in body:
            return b'{"score": 0.75}'
        prompt = body["messages"][0]["content"]
        return "SCORE: 0.6" if "Paris" in prompt else "VERDICT: CORRECT" if "kitten" in prompt else "VERDICT: INCORRECT"

    judge_server.reply = reply
    tree = {
        "workers": 1,
        "judge": {"endpoints": [{"url": judge_server.url}], "concurrency": 4},
        "reward_model": {"endpoint": {"url": judge_server.url + "/score"}},
        "domains": {"spatial": {"prompt": str(own)}},
    }
    with Rewarder(validate(RewardsConfig, tree)) as made:
        batch = [
            (task("vqa", "cat"), boxed("kitten")),
            (task("vqa", "cat"), boxed("dog")),
            (task("vqa", "cat"), boxed("cat")),
            (task("geo", "Paris"), boxed("Lyon")),
            (task("general", None), "<think>hm</think><answer>Roses are red.</answer>"),
            (task("spatial", "left"), boxed("right")),
            (task("counting", "3"), boxed("4")),
        ]
        values = [
            reward.value for reward in made.score(batch + [(task("vqa", f"cat {n}"), boxed("kitten")) for n in range(16)])
        ]
        assert values == [1.0, 0.0, 1.0, 0.6, 0.75, 0.0, 0.0, *[1.0] * 16]
        meters = made.meters()
    assert meters["judge/requests"] == 20
    assert meters["reward_model/requests"] == 1
    assert any(
        body.get("messages", [{}])[0].get("content", "").startswith("OWN How many? left right") for body in judge_server.bodies
    )
    assert 2 <= judge_server.most_under_way <= 5


def test_a_judge_that_is_down_masks_and_stops_the_run():
    tree = {
        "workers": 1,
        "judge": {"endpoints": [{"url": "http://127.0.0.1:9"}], "retries": 1, "backoff_s": 0.01, "down_after": 2},
    }
    with (
        Rewarder(validate(RewardsConfig, tree)) as made,
        pytest.raises(JudgeDown, match=r"judge_down 20; for instance: http://127.0.0.1:9: "),
    ):
        made.score([(task("vqa", "cat"), boxed("dog"))] * 20)


def test_the_tally():
    tally = Tally()
    wrong = [Reward(0.0, False, reason) for reason in ("hack: several", "format")]
    for reward in (Reward(1.0, True, "right"), *wrong, Reward(None, None, "timeout")):
        tally.add("math", reward)
    tally.add("geo", Reward(None, None, "judge_down", "http://x: ConnectError"))
    metrics = tally.metrics()
    assert metrics["reward/math"] == pytest.approx(1 / 3)
    assert metrics["masked/math"] == metrics["hacks/math"] == 0.25
    assert (metrics["masked_by/timeout"], metrics["masked_by/judge_down"]) == (1.0, 1.0)
    assert "reward/geo" not in metrics
    lines = tally.lines()
    assert lines[1].split() == ["geo", "1", "-", "-", "judge_down", "1", "-", "-"]
    assert lines[2].split() == ["math", "4", "0.333", "33.3%", "timeout", "1", "several", "1", "format", "1"]
    tally.check(0.4)
    with pytest.raises(TooManyMasked):
        tally.check(0.39)


DOWN, REFUSED = (Reward(None, None, "judge_down", f"http://x: {why}") for why in ("HTTP 503", "HTTP 401"))
TIMEOUT = Reward(None, None, "timeout")


@pytest.mark.parametrize(
    ("masked", "is_outage"),
    [([DOWN] * 4, True), ([REFUSED] * 4, False), ([TIMEOUT] * 4, False), ([DOWN] * 2 + [TIMEOUT] * 2, True),
     ([DOWN, TIMEOUT, TIMEOUT, REFUSED], False)],
)  # fmt: skip
def test_too_many_masked_are_an_outage_where_a_server_that_is_down_makes_them_too_many(masked: list[Reward], is_outage: bool):
    tally = Tally()
    for reward in [*masked, *[Reward(1.0, True, "right")] * 4]:
        tally.add("math", reward)
    with pytest.raises(TooManyMasked) as found:
        tally.check(0.25)
    assert isinstance(found.value, Outage) == is_outage


def test_neither_torch_nor_a_client_is_loaded_by_a_worker():
    names = "('torch', 'httpx', 'sympy', 'transformers')"
    code = f"import sys, megatron_glmv.rl.rewards.worker; print([name for name in {names} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
