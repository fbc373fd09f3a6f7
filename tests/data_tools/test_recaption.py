"""The client against a real server on loopback: what it sends, when it tries again, what it never pays for twice."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools import cli, recaption
from data_tools.corpus.checks import Medium
from tests.data.pictures import encode, rotated_exif
from tests.data_tools.fuzzed import contents, jpeg

NUM = 40


@dataclass
class Captioner:
    """What the server was asked, and how it is told to misbehave."""

    url: str = ""
    asked: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    failures: dict[str, list[int]] = field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    allowed: int = 1_000_000
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, body: dict[str, Any], key: str) -> tuple[int, dict[str, Any]]:
        text = body["messages"][0]["content"][-1]["text"].rpartition("Text: ")[2]
        with self.lock:
            self.asked[text] += 1
            self.bodies.append(body)
            self.keys.add(key)
            self.allowed -= 1
            if self.allowed < 0:
                return 503, {}
            if self.failures.get(text):
                return self.failures[text].pop(0), {}
        choice = {
            "message": {"content": f"<think>hm</think><answer>a better text than {text}</answer>"},
            "finish_reason": "stop",
        }
        return 200, {"choices": [self.answers.get(text, choice)], "usage": {"prompt_tokens": 100, "completion_tokens": 7}}


@pytest.fixture
def captioner(monkeypatch: pytest.MonkeyPatch) -> Iterator[Captioner]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    state = Captioner()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with state.lock:
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert self.path == "/v1/chat/completions"
            status, tree = state.answer(body, self.headers.get("authorization", ""))
            data = json.dumps(tree).encode()
            with state.lock:
                state.at_once -= 1
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for seed in range(4):
        (folder / f"{seed}.jpg").write_bytes(jpeg(seed))
    lines = [{"id": f"s{number}", "image": f"{number % 4}.jpg", "caption": f"drawing {number}"} for number in range(NUM)]
    turns = [("human", "<image>\nWhat?"), ("gpt", "A"), ("human", "And?"), ("gpt", "B")]
    lines.append({"id": "dialogue", "image": "0.jpg", "conversations": [{"from": who, "value": text} for who, text in turns]})
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def run(captioner: Captioner, corpus: Path, out: Path, *more: str) -> int:
    arguments = ["recaption", str(corpus), str(out), "--url", captioner.url, "--model", "cap", "--chunk", "16"]
    return cli.main([*arguments, "--backoff", "0.01", "--concurrency", "4", "--max-bad-share", "0.2", *more])


def captions(out: Path) -> dict[str, str]:
    samples = [json.loads(line) for path in sorted(out.glob("samples*")) for line in path.read_text().splitlines()]
    return {sample["id"]: sample["messages"][-1]["content"] for sample in samples}


def test_a_share_of_captions_is_rewritten_and_metered(
    captioner: Captioner, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTION_KEY", "secret-word")
    more = ["--key-env", "CAPTION_KEY", "--price-in", "2", "--price-out", "10"]
    assert run(captioner, corpus, tmp_path / "out", "--ratio", "0.5", *more) == 0
    found = captions(tmp_path / "out")
    assert list(found) == [*(f"s{number}" for number in range(NUM)), "dialogue"]
    new = {key for key, text in found.items() if text.startswith("a better text than drawing")}
    assert 8 <= len(new) <= 32
    assert all(found[f"s{number}"].endswith(f"drawing {number}") for number in range(NUM))
    assert found["dialogue"] == "B"
    assert set(captioner.asked) == {f"drawing {key[1:]}" for key in new}
    assert max(captioner.asked.values()) == 1
    assert captioner.most_at_once <= 4
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["recaptions"], report["prompt_tokens"], report["completion_tokens"]) == (
        len(new),
        100 * len(new),
        7 * len(new),
    )
    assert report["cost"] == pytest.approx((200 * len(new) + 70 * len(new)) / 1e6, abs=1e-4)
    assert captioner.keys == {"Bearer secret-word"}
    assert not any(b"secret-word" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    body = captioner.bodies[0]
    head, _, data = body["messages"][0]["content"][0]["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert base64.b64decode(data) in [jpeg(seed) for seed in range(4)]
    sample = json.loads((tmp_path / "out" / "samples-000000.jsonl").read_text().splitlines()[0])
    if "s0" in new:
        assert (sample["original_caption"], sample["captioned_by"]) == ("drawing 0", "cap")


def test_failures_are_tried_again_and_refusals_named(captioner: Captioner, corpus: Path, tmp_path: Path) -> None:
    captioner.failures = {"drawing 1": [503, 429], "drawing 2": [400], "drawing 3": [500]}
    captioner.answers = {"drawing 5": {"message": {"content": "cut of"}, "finish_reason": "length"},
                         "drawing 6": {"message": {"content": None}}, "drawing 7": {}}  # fmt: skip
    assert run(captioner, corpus, tmp_path / "out", "--ratio", "1") == 0
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert {entry["key"]: entry["reason"] for entry in dropped} == {
        "s2": "caption_refused", "s5": "caption_empty", "s6": "caption_empty", "s7": "caption_empty"}  # fmt: skip
    assert [captioner.asked[f"drawing {number}"] for number in (0, 1, 2, 3)] == [1, 3, 1, 2]


def test_a_server_that_goes_away_stops_the_job_and_answers_are_kept(
    captioner: Captioner, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(captioner, corpus, tmp_path / "once", "--ratio", "1") == 0
    captioner.asked.clear()
    captioner.allowed = 24
    assert run(captioner, corpus, tmp_path / "out", "--ratio", "1", "--retries", "1") == 1
    assert "no answer after 2 tries (HTTP status 503); the same command continues" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with (tmp_path / "out.partial" / "scratch" / "recaption-000001.jsonl").open("a") as file:
        file.write('["s31", "half a li')
    answered = 24
    captioner.allowed = 1_000_000
    captioner.asked.clear()
    assert run(captioner, corpus, tmp_path / "out", "--ratio", "1") == 0
    assert sum(captioner.asked.values()) == NUM - answered
    assert contents(tmp_path / "out") == contents(tmp_path / "once")
    url, captioner.url = captioner.url, "http://127.0.0.1:9/v1"
    assert run(captioner, corpus, tmp_path / "none", "--ratio", "1", "--retries", "0") == 1
    assert "http://127.0.0.1:9/v1: no answer after 1 tries" in capsys.readouterr().err
    captioner.url = url


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_a_picture_too_large_to_send_is_sent_upright(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored lying with its dark half on the left and an EXIF turn of 6: upright it is tall, and dark above.

    Of a TIFF Pillow applies the turn by itself; it is not applied twice.
    """
    monkeypatch.setattr(recaption, "SENT_BYTES", 1000)
    pixels = np.full((300, 400, 3), 250, dtype=np.uint8)
    pixels[:, :200] = 10
    data = encode(Image.fromarray(pixels), form, exif=rotated_exif(6))
    (uri,) = recaption.data_uris(Medium("image", data, {"JPEG": "jpg", "TIFF": "tiff"}[form], 300, 400))
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as sent:
        assert sent.size == (300, 400)
        grey = np.asarray(sent.convert("L"))
    assert grey[:180].max() < 50
    assert grey[220:].min() > 200
