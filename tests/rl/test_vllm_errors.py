"""The vLLM engine against a server that misbehaves: retried, left out and named, or stopped; never a wrong rollout."""

from __future__ import annotations

import base64
import io
import logging
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_glmv.config.base import ConfigError, validate
from megatron_glmv.config.engines import VllmConfig
from megatron_glmv.convert.hf_folder import HfWeights
from megatron_glmv.rl.engines import vllm_weights
from megatron_glmv.rl.engines.engine import EngineDown, EngineError, Request, Sampling
from megatron_glmv.rl.engines.vllm import VllmEngine
from megatron_glmv.rl.engines.vllm_wire import RequestFailed, collapse, upload
from megatron_glmv.rl.force_answer import ForceRule
from megatron_glmv.rl.types import MediaFile, Prompt, Rollout, Task
from megatron_glmv.run_folder.refusal import Outage
from tests.data.pictures import draw, encode
from tests.model import oracle
from tests.rl.fake_vllm import FakeVllm

SHAPE = oracle.model_shape("digits")
SPECIAL = SHAPE.tokens
WEIGHTS = {name: tensor.detach() for name, tensor in oracle.random_model("digits").named_parameters()}
GENERATE = "/inference/v1/generate"
RULE = ForceRule(thinking_tokens=6, answer_tokens=3, end_of_think=(40, 41), answer_open=(42,))


@pytest.fixture
def server() -> Iterator[FakeVllm]:
    opened = FakeVllm()
    yield opened
    opened.close()


@pytest.fixture
def second() -> Iterator[FakeVllm]:
    opened = FakeVllm()
    yield opened
    opened.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    """Makes engines for servers: as rank 0 brings weights (update), as another rank finds them (expect), or without any."""
    made: list[VllmEngine] = []

    def engine(
        *servers: FakeVllm | str,
        rule: ForceRule | int = 4,
        ready: str = "expect",
        max_prompt_tokens: int = 0,
        **settings: Any,
    ) -> VllmEngine:
        addresses = [one if isinstance(one, str) else one.url for one in servers]
        defaults = {"backoff_s": 0.01, "timeout_s": 5, "concurrency": 4, "weights": {"folder": str(tmp_path / "weights")}}
        config = validate(VllmConfig, defaults | {"addresses": addresses} | settings)
        sampling = Sampling(1.0, 1.0, SPECIAL.eos, rule, lambda ids: " ".join(map(str, ids)))
        made.append(VllmEngine(SHAPE, sampling, config, max_prompt_tokens=max_prompt_tokens))
        if ready == "update":
            made[-1].update_weights(WEIGHTS.items(), version=3)
        elif ready == "expect":
            for one in servers:
                if isinstance(one, FakeVllm):
                    one.version = "3"
            made[-1].expect_version(3)
        return made[-1]

    yield engine
    for one in made:
        one.close()


def prompt(key: str = "a", *tokens: int) -> Prompt:
    return Prompt(Task(key, "none", "", ""), np.array(tokens or (30, 31, 32), dtype=np.int64))


def answers(engine: VllmEngine, *requests: Request) -> list[list[Rollout]]:
    found = dict(engine.generate(requests))
    return [found[place] for place in range(len(requests))]


def tokens(rollouts: list[Rollout]) -> list[list[int]]:
    return [one.tokens.tolist() for one in rollouts]


def bad(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}


def changed(server: FakeVllm, **changes: Any) -> None:
    """Let every choice of a reply have other fields."""

    def override(path: str, body: Any, number: int) -> tuple[int, Any] | None:
        if path != GENERATE or "n" not in body["sampling_params"]:
            return None
        reply = server.generate(body)
        for choice in reply["choices"]:
            choice.update({name: value(choice) if callable(value) else value for name, value in changes.items()})
        return 200, reply

    server.override = override


def test_everything_of_the_sampling_is_sent(server: FakeVllm, make) -> None:
    [rollouts] = answers(make(server, answers_per_request=8, concurrency=1), Request(prompt(), 20, seed=5))
    assert [body["sampling_params"]["n"] for body in server.asked()] == [8, 8, 4]
    params = server.asked()[0]["sampling_params"]
    expected = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "max_tokens": 4, "min_tokens": 0, "logprobs": 0}
    penalties = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
    stops = {"stop_token_ids": list(SPECIAL.eos), "ignore_eos": True}
    assert {key: params[key] for key in expected | penalties | stops} == expected | penalties | stops
    assert server.asked()[0]["return_token_ids"] is True and server.asked()[0]["model"] == "policy"
    assert len({tuple(one.tokens) for one in rollouts}) == 20
    assert all((one.finish, one.weights_version, one.text) == ("length", 3, " ".join(map(str, one.tokens))) for one in rollouts)


def test_an_answer_has_its_seed_however_many_are_asked_at_once(server: FakeVllm, make) -> None:
    wide = answers(make(server, answers_per_request=8), Request(prompt(), 5, seed=5), Request(prompt(), 5, seed=6))
    narrow = answers(make(server, answers_per_request=2), Request(prompt(), 5, seed=5))[0]
    assert tokens(wide[0]) == tokens(narrow)
    assert not {tuple(one.tokens) for one in wide[0]} & {tuple(one.tokens) for one in wide[1]}


def test_weights_arrive_in_the_one_order_that_is_safe(server: FakeVllm, make, tmp_path: Path) -> None:
    engine = make(server, ready="update")
    steps = ["/pause?mode=abort", "/collective_rpc", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"]
    steps += ["/update_weight_version", "/resume"]
    assert [path for path in server.paths() if path in steps] == steps
    assert not server.paused and server.version == "3"
    [call] = [body for path, body in server.calls if path == "/collective_rpc"]
    folder = Path(call["kwargs"]["weights_path"])
    assert call["method"] == "reload_weights" and folder.is_absolute()
    written = HfWeights(folder)
    assert set(written.shapes) == set(WEIGHTS)
    name = "model.visual.merger.proj.weight"
    assert torch.equal(written.read(name, 0, len(WEIGHTS[name]), None), WEIGHTS[name])
    backwards = {name: -tensor for name, tensor in reversed(WEIGHTS.items())}
    engine.update_weights(backwards.items(), version=4)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["weights-4"]
    written = HfWeights(tmp_path / "weights" / "weights-4")
    assert torch.equal(written.read(name, 0, len(WEIGHTS[name]), None), -WEIGHTS[name])
    engine.update_weights(WEIGHTS.items(), version=4)  # a run that goes on from an earlier checkpoint
    assert answers(engine, Request(prompt(), 1, seed=0))[0][0].weights_version == 4


def test_weights_that_do_not_come_whole_are_refused(server: FakeVllm, make) -> None:
    engine = make(server, ready="update")
    with pytest.raises(EngineError, match=r"no tensor model\.extra of \[2\]"):
        engine.update_weights([("model.extra", torch.zeros(2))], version=4)
    with pytest.raises(EngineError, match=r"no complete weights"):
        answers(engine, Request(prompt(), 1, seed=0))
    with pytest.raises(EngineError, match=r"lack lm_head\.weight and 0 more"):
        engine.update_weights([item for item in WEIGHTS.items() if item[0] != "lm_head.weight"], version=4)
    assert server.version == "3" and not server.paused


def test_a_load_that_fails_ends_the_run_and_leaves_the_server_paused(server: FakeVllm, make) -> None:
    server.override = lambda path, body, number: bad(500, "no such folder") if path == "/collective_rpc" else None
    with pytest.raises(EngineDown, match=r"127.*_rpc: HTTP 500 \(no such folder\); does this server see .*weights-3"):
        make(server, ready="update")
    assert server.paused and "/resume" not in server.paths()


def breaks_off(path: str, body: Any, number: int) -> tuple[int, Any] | None:
    """The server's process dies while it loads."""
    if path == "/collective_rpc":
        raise ConnectionResetError
    return None


def fails(path: str, body: Any, number: int) -> tuple[int, Any] | None:
    return bad(500, "out of memory") if path == "/collective_rpc" else None


def holds_its_cache(path: str, body: Any, number: int) -> tuple[int, Any] | None:
    return (200, {"success": False}) if path == "/reset_prefix_cache" else None


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (breaks_off, "/collective_rpc: RemoteProtocolError\n"),
        (fails, r"HTTP 500 \(out of memory\); does this server see .*weights-3\? It must be started again\n"),
        (holds_its_cache, "the prefix cache cannot be emptied"),
    ],
)
def test_a_server_that_does_not_load_is_left_out(
    server: FakeVllm, second: FakeVllm, make, caplog, monkeypatch: pytest.MonkeyPatch, fault: Any, reason: str
) -> None:
    monkeypatch.setattr(vllm_weights, "_WAIT_S", 0.001)
    second.override = fault
    engine = make(server, second, ready="update")
    assert re.search(f"{second.url} is left out until new weights are sent: .*{reason}", caplog.text)
    assert all(answers(engine, *(Request(prompt(), 1, seed=seed) for seed in range(4))))
    assert len(server.asked()) == 4 and not second.asked() and "/resume" not in second.paths()
    second.override = lambda path, body, number: None
    engine.update_weights(WEIGHTS.items(), version=4)
    assert second.version == "4"


def test_a_server_that_lacks_an_option_ends_the_run_beside_others(server: FakeVllm, second: FakeVllm, make) -> None:
    second.override = lambda path, body, number: bad(404, "Not Found") if path == "/collective_rpc" else None
    with pytest.raises(EngineError, match=r"HTTP 404 \(Not Found\); start it with VLLM_SERVER_DEV_MODE=1"):
        make(server, second, ready="update")


def test_a_cache_that_is_still_held_is_emptied_again(server: FakeVllm, make) -> None:
    server.override = lambda path, body, number: (
        (200, {"success": number >= 2}) if path == "/reset_prefix_cache" and number < 3 else None
    )
    make(server, ready="update")
    assert server.paths().count("/reset_prefix_cache") == 3


def test_other_ranks_expect_the_version(server: FakeVllm, make) -> None:
    make(server, ready="update")
    other = make(server, ready="not")
    with pytest.raises(EngineError, match="no complete weights"):
        other.check_health()
    with pytest.raises(EngineError, match=r"no vLLM server is left .*serves weights 3 and not 4: .*started again"):
        other.expect_version(4)
    other.expect_version(3)
    other.check_health()
    assert answers(other, Request(prompt(), 1, seed=0))[0][0].weights_version == 3
    assert server.paths().count("/pause?mode=abort") == 1


def closed_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_is_down_ends_the_run_with_one_line(make) -> None:
    url = closed_address()
    with pytest.raises(EngineDown, match=rf"server is left \({url}: ConnectError\); start them .*vllm_server\.sh") as found:
        make(url)
    assert "\n" not in str(found.value)


def test_a_server_that_dies_ends_the_run(server: FakeVllm, make) -> None:
    engine = make(server, retries=1)
    engine.check_health()
    server.close()
    with pytest.raises(EngineDown, match=r"no vLLM server is left .*ConnectError"):
        answers(engine, Request(prompt(), 1, seed=0), Request(prompt(), 1, seed=1))
    with pytest.raises(EngineError, match="no vLLM server is left"):
        engine.check_health()


def test_an_engine_that_died_behind_its_server_ends_the_run(server: FakeVllm, make) -> None:
    engine = make(server, retries=1)
    server.override = lambda path, body, number: bad(500 if path == GENERATE else 503, "EngineCore died")
    with pytest.raises(EngineDown, match=r"no vLLM server is left .*HTTP 500 \(EngineCore died\)"):
        answers(engine, Request(prompt(), 1, seed=0))


def test_the_other_servers_take_over(server: FakeVllm, second: FakeVllm, make, caplog) -> None:
    engine = make(server, second, retries=0)
    requests = [Request(prompt(str(seed)), 2, seed=seed) for seed in range(8)]
    before = answers(engine, *requests)
    assert len(server.asked()) + len(second.asked()) == 8 and server.asked() and second.asked()
    second.close()
    after = answers(engine, *requests)
    assert [[one.tokens.tolist() for one in group] for group in after] == [
        [one.tokens.tolist() for one in group] for group in before
    ]
    assert f"{second.url} is left out until new weights are sent" in caplog.text
    engine.update_weights(WEIGHTS.items(), version=4)
    assert len(answers(engine, *requests)) == 8


def test_a_server_that_was_started_again_gets_nothing(server: FakeVllm, second: FakeVllm, make) -> None:
    engine = make(server, second)
    second.version = "default"
    groups = answers(engine, *(Request(prompt(), 1, seed=seed) for seed in range(8)))
    assert all(group[0].weights_version == 3 for group in groups)
    server.version = "default"
    with pytest.raises(EngineError, match=r"serves weights default and not 3"):
        answers(engine, Request(prompt(), 1, seed=0))


def test_answers_of_two_versions_are_not_taken(server: FakeVllm, make) -> None:
    engine = make(server)
    changed(server, weight_versions=[{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 4}])
    with pytest.raises(EngineError, match="serves weights 3, 4 and not 3"):
        answers(engine, Request(prompt(), 1, seed=0))


def test_a_slow_server_costs_the_answers(server: FakeVllm, make, caplog) -> None:
    engine = make(server, retries=1)
    server.delay_s = 1.0
    engine._servers._config = engine._servers._config.model_copy(update={"timeout_s": 0.1})
    start = time.monotonic()
    assert answers(engine, Request(prompt("slow one"), 2, seed=0)) == [[]]
    assert time.monotonic() - start < 0.9
    assert "slow one: 2 answers are left out" in caplog.text and "ReadTimeout after 0.1 s" in caplog.text
    assert (engine.meter.retries, engine.meter.failures) == (1, 1)


RUBBISH = [
    b"<html>busy</html>",
    b"[" * 100_000,
    b"[1, 2]",
    b"",
    {"choices": []},
    {"prompt_token_ids": [30, 31, 32], "choices": []},
]


@pytest.mark.parametrize("reply", RUBBISH, ids=range(len(RUBBISH)))
def test_rubbish_is_tried_again_then_left_out(server: FakeVllm, make, caplog, reply: Any) -> None:
    engine = make(server, retries=2)
    server.override = lambda path, body, number: (200, reply) if path == GENERATE else None
    assert answers(engine, Request(prompt("sample-7"), 2, seed=0)) == [[]]
    assert len(server.asked()) == 3 and "sample-7: 2 answers are left out" in caplog.text
    server.override = lambda path, body, number: None
    assert len(answers(engine, Request(prompt(), 2, seed=0))[0]) == 2


def test_a_busy_server_is_asked_again(server: FakeVllm, make) -> None:
    engine = make(server)
    seen: list[Any] = []

    def override(path: str, body: Any, number: int) -> tuple[int, Any] | None:
        if path != GENERATE:
            return None
        seen.append(body)
        return bad(503, "busy") if len(seen) <= 2 else None

    server.override = override
    assert len(answers(engine, Request(prompt(), 2, seed=0))[0]) == 2
    assert len(seen) == 3 and seen[0] == seen[2] and engine.meter.retries == 2 and engine.meter.failures == 0


def test_a_refused_prompt_is_named_and_the_others_go_on(server: FakeVllm, make, caplog) -> None:
    engine = make(server)
    message = "The decoder prompt (length 2000) is longer than the maximum model length of 1024."
    server.override = lambda path, body, number: bad(400, message) if path == GENERATE and len(body["token_ids"]) > 9 else None
    long = prompt("novel-3", *range(30, 60))
    groups = answers(engine, Request(prompt(), 2, seed=0), Request(long, 2, seed=1), Request(prompt(), 2, seed=2))
    assert [len(group) for group in groups] == [2, 0, 2]
    assert sum(len(body["token_ids"]) > 9 for body in server.asked()) == 1
    [record] = [record for record in caplog.records if "novel-3" in record.getMessage()]
    assert message in record.getMessage() and record.levelno == logging.WARNING


def test_only_the_failed_part_of_a_group_is_missing(server: FakeVllm, make) -> None:
    engine = make(server, answers_per_request=2)
    server.override = lambda path, body, number: bad(400, "no") if path == GENERATE and number == 3 else None
    [rollouts] = answers(engine, Request(prompt(), 6, seed=0))
    assert len(rollouts) == 4


def test_other_prompt_ids_are_no_rollout(server: FakeVllm, make, caplog) -> None:
    engine = make(server)
    server.expand = lambda ids: [*ids[:2], 15, *ids[2:]]
    assert answers(engine, Request(prompt("doubled"), 2, seed=0)) == [[]]
    assert len(server.asked()) == 1
    assert "doubled" in caplog.text and "reads 4 tokens where 3 were meant, other ones from place 2 on" in caplog.text


def every(value: float) -> Any:
    """A change that gives every token this log-probability."""
    return {"logprobs": lambda choice: {"content": [one | {"logprob": value} for one in choice["logprobs"]["content"]]}}


def twice(choice: dict) -> dict:
    return {"content": choice["logprobs"]["content"] * 2}


CONTRADICTIONS = [
    ({"logprobs": lambda choice: {"content": choice["logprobs"]["content"][:-1]}}, "4 tokens came with 3 log-prob"),
    ({"logprobs": None}, "4 tokens came with 0 log-prob"),
    ({"token_ids": [77, 77, 77, 77]}, "or with those of other tokens"),
    ({"finish_reason": "stop"}, "none of its stop tokens"),
    (every(-9999.0), "without a log-probability"),
    (every(float("nan")), "without a log-probability"),
    ({"logprobs": twice, "token_ids": lambda choice: choice["token_ids"] * 2}, "8 tokens where 4 were allowed"),
    ({"finish_reason": "repetition"}, "ended with 'repetition'"),
    ({"index": 5}, "answers instead of 1"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS, ids=range(len(CONTRADICTIONS)))
def test_a_reply_that_contradicts_itself_is_no_rollout(server: FakeVllm, make, caplog, changes: Any, message: str) -> None:
    engine = make(server, retries=1)
    changed(server, **changes)
    assert answers(engine, Request(prompt("odd"), 1, seed=0)) == [[]]
    assert message in caplog.text and "odd: 1 answers are left out" in caplog.text


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_without_an_option_ends_the_run(server: FakeVllm, make, status: int) -> None:
    engine = make(server)
    server.override = lambda path, body, number: bad(status, "no") if path == GENERATE else None
    hint = {401: "token_env", 403: "--enable-scale-out", 404: "VLLM_SERVER_DEV_MODE=1"}[status]
    with pytest.raises(EngineError, match=f"HTTP {status}.*{hint}") as found:
        answers(engine, Request(prompt(), 1, seed=0))
    assert not isinstance(found.value, Outage)


def test_a_server_without_weight_endpoints_is_named(server: FakeVllm, make) -> None:
    server.override = lambda path, body, number: (404, {"detail": "Not Found"}) if path.startswith("/pause") else None
    with pytest.raises(EngineError, match=r"/pause.*HTTP 404 \(Not Found\); start it with VLLM_SERVER_DEV_MODE=1"):
        make(server, ready="update")


def test_a_server_of_another_model_is_named(make) -> None:
    server = FakeVllm(name="glm")
    try:
        with pytest.raises(EngineError, match=rf"{server.url}: serves glm; start it with --served-model-name policy"):
            make(server)
    finally:
        server.close()


def test_a_server_that_reports_other_log_probabilities_is_refused(server: FakeVllm, make) -> None:
    def override(path: str, body: Any, number: int) -> tuple[int, Any] | None:
        if path != GENERATE:
            return None
        return 200, server.generate(body | {"sampling_params": body["sampling_params"] | {"temperature": 1.0}})

    server.override = override
    with pytest.raises(EngineError, match=r"probabilities of temperature 1; start it with --logprobs-mode processed_logprobs"):
        make(server)

    def logits(path: str, body: Any, number: int) -> tuple[int, Any] | None:
        reply = server.generate(body) if path == GENERATE else None
        for entry in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"] if reply else ():
            entry["logprob"] += 7
        return (200, reply) if reply else None

    server.override = logits
    with pytest.raises(EngineError, match="reports logits") as found:
        make(server)
    assert not isinstance(found.value, Outage)


def test_another_version_of_vllm_is_told(server: FakeVllm, make, caplog) -> None:
    server.override = lambda path, body, number: (200, {"version": "0.40.1"}) if path == "/version" else None
    make(server)
    assert "vLLM 0.40.1; this engine is tested with 0.32" in caplog.text


def test_aborted_answers_keep_what_they_have(server: FakeVllm, make) -> None:
    engine = make(server, rule=RULE)
    server.sample = lambda params, index: [50, 51, 52][: params["max_tokens"]]
    changed(server, finish_reason="abort")
    [[rollout]] = answers(engine, Request(prompt(), 1, seed=0))
    assert (rollout.finish, rollout.tokens.tolist()) == ("abort", [50, 51, 52])
    changed(server, finish_reason="abort", token_ids=[], logprobs={"content": []}, weight_versions=None)
    [[rollout]] = answers(engine, Request(prompt(), 1, seed=0))
    assert (rollout.finish, rollout.tokens.tolist()) == ("abort", [])
    assert rollout.given_up


def test_an_answer_ends_before_a_token_of_pixels(server: FakeVllm, make) -> None:
    engine = make(server, rule=RULE)
    server.sample = lambda params, index: [50, 51, SPECIAL.image, 52, 53, 54] if index else [50, SPECIAL.video, SPECIAL.eos[0]]
    rollouts = answers(engine, Request(prompt(), 2, seed=0))[0]
    assert [(one.finish, one.tokens.tolist()) for one in rollouts] == [("abort", [50]), ("abort", [50, 51])]
    assert not any(one.given_up for one in rollouts)
    assert len(server.asked()) == 1


def test_forced_answers_are_continued(server: FakeVllm, make) -> None:
    engine = make(server, rule=RULE, concurrency=1)
    [rollouts] = answers(engine, Request(prompt(), 3, seed=9))
    asked = server.asked()
    first, *further = asked
    assert first["sampling_params"]["max_tokens"] == 6 and len(further) == 3
    for rollout in rollouts:
        written = rollout.tokens.tolist()
        assert written[6:9] == [40, 41, 42] and np.flatnonzero(rollout.inserted).tolist() == [6, 7, 8] and len(written) == 12
        [body] = [body for body in further if body["token_ids"] == [30, 31, 32, *written[:9]]]
        assert (body["sampling_params"]["n"], body["sampling_params"]["max_tokens"]) == (1, 3)
        assert (rollout.logprobs[rollout.inserted] == 0).all() and (rollout.logprobs[~rollout.inserted] < 0).all()
    seeds = [body["sampling_params"]["seed"] for body in asked]
    assert len(set(seeds)) == 4
    assert tokens(answers(engine, Request(prompt(), 3, seed=9))[0]) == tokens(rollouts)


def test_the_server_that_has_read_a_prompt_continues_it(server: FakeVllm, second: FakeVllm, make) -> None:
    engine = make(server, second, rule=RULE, concurrency=2)
    server.delay_s = second.delay_s = 0.1
    answers(engine, Request(prompt("a", 50, 51), 3, seed=0), Request(prompt("b", 60, 61), 3, seed=1))
    read = [{body["token_ids"][0] for body in one.asked()} for one in (server, second)]
    assert sorted(map(sorted, read)) == [[50], [60]] and len(server.asked()) == len(second.asked()) == 4


def test_an_answer_ends_where_the_context_does(make) -> None:
    server = FakeVllm(max_model_len=12)
    try:
        server.sample = lambda params, index: [50] * min(params["max_tokens"], 5)
        rollouts = answers(make(server, rule=RULE), Request(prompt(), 2, seed=0))[0]  # clipped: 5 of 6
        assert [(one.finish, len(one.tokens)) for one in rollouts] == [("length", 5)] * 2
        server.sample = lambda params, index: [50] * params["max_tokens"]
        rollouts = answers(make(server, rule=RULE), Request(prompt(), 2, seed=0))[0]  # 3 + 6 + 3 inserted = 12
        assert [(one.finish, len(one.tokens)) for one in rollouts] == [("length", 9)] * 2
        assert len(server.asked()) == 2
    finally:
        server.close()


def test_a_context_without_room_for_an_answer_is_refused(make) -> None:
    server = FakeVllm(max_model_len=11)
    try:
        with pytest.raises(EngineError, match=r"take 11 tokens, and an answer 12: start them with more --max-model-len"):
            make(server, rule=RULE, ready="update")
        with pytest.raises(EngineError, match=r"--max-model-len"):
            make(server, rule=RULE, ready="not").load_folder(Path("anywhere"), 0)
        assert "/pause?mode=abort" not in server.paths()
    finally:
        server.close()


def test_a_context_that_cuts_the_longest_answers_off_is_told_once(make, caplog) -> None:
    server = FakeVllm(max_model_len=31)
    try:
        engine = make(server, rule=RULE, ready="update", max_prompt_tokens=19)
        assert "max-model-len" not in caplog.text
        engine = make(server, rule=RULE, ready="update", max_prompt_tokens=20)
        engine.update_weights(WEIGHTS.items(), version=4)
        [said] = [record.getMessage() for record in caplog.records if "max-model-len" in record.getMessage()]
        assert "take 31 tokens" in said and "--max-model-len 32" in said
    finally:
        server.close()


def test_one_who_stops_listening_holds_nothing_up(server: FakeVllm, make) -> None:
    engine = make(server, concurrency=1)
    server.delay_s = 0.05
    found = engine.generate([Request(prompt(), 1, seed=seed) for seed in range(50)])
    next(found)
    found.close()
    start = time.monotonic()
    assert len(answers(engine, Request(prompt(), 1, seed=0))[0]) == 1
    assert time.monotonic() - start < 1
    assert len(server.asked()) < 10


def test_a_request_for_nothing_is_answered_with_nothing(server: FakeVllm, make) -> None:
    assert answers(make(server), Request(prompt(), 0, seed=0), Request(prompt(), 1, seed=0))[0] == []


def test_the_token_is_sent_and_never_shown(server: FakeVllm, make, monkeypatch, caplog) -> None:
    with pytest.raises(ConfigError, match="the environment variable ENGINE_TOKEN is not set"):
        make(server, token_env="ENGINE_TOKEN")
    monkeypatch.setenv("ENGINE_TOKEN", "sesame-1234")
    caplog.set_level(logging.DEBUG)
    engine = make(server, token_env="ENGINE_TOKEN")
    assert all(headers["Authorization"] == "Bearer sesame-1234" for headers in server.headers)
    server.override = lambda path, body, number: bad(400, "you said Bearer sesame-1234")
    assert answers(engine, Request(prompt(), 1, seed=0)) == [[]]
    server.override = lambda path, body, number: bad(404, "you said Bearer sesame-1234")
    with pytest.raises(EngineError) as found:
        answers(engine, Request(prompt(), 1, seed=0))
    assert "you said Bearer ***" in caplog.text and "sesame" not in caplog.text + str(found.value)


# Pictures and videos on their way to the server.

IMAGE = MediaFile("image", encode(draw(56, 84)), "png")
IMAGE_IDS = [SPECIAL.image_start, *[SPECIAL.image] * 6, SPECIAL.image_end]
VIDEO = MediaFile("video", b"mp4", "mp4", num_frames=2)
FRAME_IDS = [SPECIAL.image_start, *[SPECIAL.image] * 2, SPECIAL.image_end, 70]
VIDEO_IDS = [SPECIAL.video_start, *FRAME_IDS, *FRAME_IDS, SPECIAL.video_end]
ONE_IMAGE = [SPECIAL.image_start, SPECIAL.image, SPECIAL.image_end]
ONE_VIDEO = [SPECIAL.video_start, SPECIAL.video, SPECIAL.video_end]


def with_media(tokens: list[int], files: tuple[MediaFile, ...]) -> Prompt:
    frames = [(4, 6) if file.kind == "image" else (2, 4) for file in files for _ in range(file.num_frames)]
    return Prompt(Task("m", "none", "", ""), np.array(tokens, dtype=np.int64), tuple(frames), files=files)


@pytest.mark.parametrize(
    ("tokens", "files", "collapsed"),
    [
        ([30, 31], (), [30, 31]),
        ([30, *IMAGE_IDS, 31], (IMAGE,), [30, *ONE_IMAGE, 31]),
        ([*IMAGE_IDS, *IMAGE_IDS, 31], (IMAGE, IMAGE), [*ONE_IMAGE, *ONE_IMAGE, 31]),
        ([30, *VIDEO_IDS, 31], (VIDEO,), [30, *ONE_VIDEO, 31]),
        ([30, *VIDEO_IDS, 32, *IMAGE_IDS, *VIDEO_IDS], (VIDEO, IMAGE, VIDEO), [30, *ONE_VIDEO, 32, *ONE_IMAGE, *ONE_VIDEO]),
    ],
)
def test_placeholders_are_collapsed(tokens: list[int], files: tuple[MediaFile, ...], collapsed: list[int]) -> None:
    assert collapse(with_media(tokens, files), SHAPE) == collapsed


@pytest.mark.parametrize(
    ("tokens", "files", "message"),
    [
        ([30, 31], (IMAGE,), "0 placeholders, 1 frames of 6 tokens and 1 files"),
        ([30, *IMAGE_IDS[:-2]], (IMAGE,), "5 placeholders"),
        ([30, *IMAGE_IDS[:3], 33, *IMAGE_IDS[3:]], (IMAGE,), "do not stand together"),
        ([30, *VIDEO_IDS[1:]], (VIDEO,), "no token 13"),
    ],
)
def test_placeholders_of_other_files_are_refused(tokens: list[int], files: tuple[MediaFile, ...], message: str) -> None:
    with pytest.raises(RequestFailed, match=message):
        collapse(with_media(tokens, files), SHAPE)
    without = Prompt(Task("m", "none", "", ""), np.array(IMAGE_IDS, dtype=np.int64), ((4, 6),))
    with pytest.raises(RequestFailed, match="not their files"):
        collapse(without, SHAPE)


def test_pictures_go_along_with_every_piece(server: FakeVllm, make, caplog) -> None:
    engine = make(server, rule=RULE)
    server.expand = lambda ids: [one for token in ids for one in ([token] * 6 if token == SPECIAL.image else [token])]
    [rollouts] = answers(engine, Request(with_media([30, *IMAGE_IDS, 31], (IMAGE,)), 2, seed=0))
    assert len(rollouts) == 2 and all(one.inserted.any() for one in rollouts)
    assert all(body["content_parts"] == [upload(IMAGE)] for body in server.asked()) and len(server.asked()) == 3
    assert upload(IMAGE)["url"].startswith("data:image/png;base64,") and upload(VIDEO)["type"] == "video_url"
    assert upload(MediaFile("image", b"no picture", "jpg"))["url"].startswith("data:image/jpeg;base64,")


def test_transparency_is_dropped_and_not_blended() -> None:
    pixels = draw(40, 60)
    image = Image.fromarray(pixels).convert("RGBA")
    image.putalpha(100)
    url = upload(MediaFile("image", encode(image, "WEBP", lossless=True, exact=True), "webp"))["url"]
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as sent:
        assert sent.mode == "RGB" and np.array_equal(np.asarray(sent), pixels)
