"""Every tool goes through a corpus with one of every fault to its end, names each, and writes nowhere but into its folder."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data_tools import cli
from data_tools.corpus.faults import FAULTS as CODES
from tests.data_tools.fuzzed import FAULTS, GOOD, MISNAMED, bomb, contents, jpeg, write_fuzzed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzzed")
    write_fuzzed(folder)
    (folder / "concepts.txt").write_text("drawing\nfields\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def captioner() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            body = json.dumps({"choices": [{"message": {"content": "a caption"}, "finish_reason": "stop"}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


ARGUMENTS = {
    "filter": [],
    "dedupe": [],
    "balance": ["--concepts", "{base}/concepts.txt", "--unmatched", "keep"],
    "recaption": ["--url", "{url}", "--model", "m", "--ratio", "1"],
}


@pytest.mark.parametrize(
    ("tool", "form"),
    [("filter", "jsonl"), ("filter", "webdataset"), ("filter", "parquet"), ("dedupe", "webdataset"), ("balance", "parquet"),
     ("recaption", "jsonl")],
)  # fmt: skip
def test_every_fault_is_named_and_nothing_is_written_elsewhere(
    base: Path, tool: str, form: str, captioner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    before = contents(base)
    own = [argument.format(base=base, url=captioner) for argument in ARGUMENTS[tool]]
    frame = ["--form", form, "--workers", "1", "--chunk", "8", "--max-bad-share", "1"]
    assert cli.main([tool, str(base / "corpus"), str(tmp_path / "here" / "out"), *own, *frame]) == 0
    assert contents(base) == before
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["out"]
    out = tmp_path / "here" / "out"
    report = json.loads((out / "report.json").read_text())
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert Counter(entry["reason"] for entry in dropped if entry["is_fault"]) == FAULTS
    assert set(FAULTS) <= set(CODES)
    assert report["faults"] == sum(FAULTS.values())
    assert report["kept"] == GOOD
    assert report["misnamed"] == MISNAMED
    assert all(entry["source"] and entry["key"] for entry in dropped)
    assert cli.main([tool, str(base / "corpus"), str(tmp_path / "twice"), *own, *frame]) == 0
    assert contents(tmp_path / "twice") == contents(out)
    # What one tool wrote, another reads without a fault.
    again = ["filter", str(out), str(tmp_path / "again"), *frame]
    assert cli.main(again) == 0
    report = json.loads((tmp_path / "again" / "report.json").read_text())
    assert (report["samples"], report["kept"], report["faults"]) == (GOOD, GOOD, 0)


def test_boxes_and_pages_name_their_faults(base: Path, tmp_path: Path) -> None:
    box = {"phrase": "a field", "box": [5, 5, 60, 60]}
    good = {"image": "i/0.jpg", "boxes": [box, {"phrase": "it", "box": [9, 9, 80, 80]}]}
    lines = [good, good | {"image": "i/cut.jpg"}, good | {"image": "i/bomb.png"}, good | {"image": "../secret.jpg"},
             good | {"image": "i/page.jpg"}, good | {"image": "i/gone.jpg"}, good | {"boxes": None}, good | {"boxes": [3]},
             good | {"boxes": [{"phrase": float("nan"), "box": [1, 2, 3, 4]}]}, good | {"width": 7, "height": 7},
             good | {"boxes": [box, {"phrase": "it", "box": [float("nan")] * 4}]}]  # fmt: skip
    path = tmp_path / "boxes.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n{\n", encoding="utf-8")
    frame = ["--workers", "1", "--max-bad-share", "1"]
    assert cli.main(["grounding", str(path), str(tmp_path / "out"), "--media-root", str(base / "corpus"), *frame]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kept"] == 1
    assert report["dropped"] == {
        "boxes_few": 1, "image_bomb": 1, "image_broken": 1, "json_invalid": 1, "media_missing": 1, "media_wrong_type": 1,
        "name_outside": 1, "sample_invalid": 2, "size_differs": 1, "text_not_a_string": 1,
    }  # fmt: skip
    assert report["faults"] == 10
    (tmp_path / "text.txt").write_text("some lines of text\nto draw\n中文\n", encoding="utf-8")
    backgrounds = tmp_path / "backgrounds"
    backgrounds.mkdir()
    for name, data in (("a.jpg", jpeg(0)), ("b.jpg", jpeg(1)[:900]), ("c.png", bomb()), ("d.png", b"")):
        (backgrounds / name).write_bytes(data)
    pages = ["render-ocr", str(tmp_path / "pages"), "--text", str(tmp_path / "text.txt"), "--backgrounds", str(backgrounds)]
    assert cli.main([*pages, "--count", "40", *frame]) == 0
    report = json.loads((tmp_path / "pages" / "report.json").read_text())
    assert set(report["dropped"]) == {"background_broken", "glyphs_missing", "image_bomb"}
    assert report["kept"] + report["faults"] == 40
    assert report["kept"] > 0
