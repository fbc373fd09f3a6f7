"""The page of packed rows: complete without any other file, right in a real browser, bounded in size; and the lint."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools import cli, inspect_rows, pack, row_page
from data_tools.lint import LINTS, Linter
from data_tools.pack_rows import RowSettings
from megatron_glmv.data.chat import Chat
from megatron_glmv.data.sample import parse_sample
from megatron_glmv.data.shard_reader import ShardReader, StoredRow
from megatron_glmv.sequence.grid import Grid
from megatron_glmv.sequence.packed import Document
from megatron_glmv.sequence.positions import multimodal_positions
from tests.data.clips import clip
from tests.data.pictures import draw, encode
from tests.data.processor import write_processor
from tests.data_tools.browser import browse, find_chromium

QUESTION = "What is shown?\nBriefly, <b>please</b> & well."
FINE = "<think>4 and 7</think><answer>It is <|begin_of_box|>11<|end_of_box|>.</answer>"


def talk(key: str, *shown: tuple[str, str], question: str = QUESTION, answer: str = FINE) -> str:
    items = [{"type": kind, kind: name} for kind, name in shown]
    turns = [
        {"role": "user", "content": [*items, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer},
    ]
    return json.dumps({"id": key, "messages": turns})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed data set of pictures, a video and texts; two samples are not as they should be."""
    base = tmp_path_factory.mktemp("inspect")
    write_processor(base / "processor", min_pixels=1568)
    for number in range(3):
        (base / f"{number}.jpg").write_bytes(encode(draw(80 + 40 * number, 150, number), "JPEG"))
    (base / "clip.mp4").write_bytes(clip(61, 60, 100))
    lines = [talk(f"text-{number}", answer=FINE.replace("4 and 7", "digits, " * number)) for number in range(3, 20)]
    lines += [talk(f"picture-{number}", ("image", f"{number % 3}.jpg")) for number in range(12)]
    lines += [talk("both", ("image", "0.jpg"), ("image", "1.jpg")), talk("film", ("video", "clip.mp4")),
              talk("broken", answer="<think>never closed <answer>11</answer>"), talk("left", question="<image>")]  # fmt: skip
    (base / "samples.jsonl").write_text("\n".join(lines) + "\n")
    plan = pack.Plan((base / "samples.jsonl",), RowSettings(base / "processor", 1024), max_bad_share=1)
    assert pack.pack_samples(plan, base / "set", num_workers=1)["kept"] == len(lines)
    return base


@pytest.fixture(scope="module")
def chromium() -> str:
    return find_chromium()


def test_the_browser_shows_every_token_where_it_is(folder: Path, chromium: str, tmp_path: Path) -> None:
    """What the page's script makes of a document, in Chromium: ids, weights and positions are those of the row."""
    page = tmp_path / "page.html"
    report = inspect_rows.inspect_rows(folder / "set", page, rows="0-1")
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:|#)|@import|url\(""", text), "a resource from outside"
    probe = ("<script>document.body.dataset.probe = JSON.stringify([page.documents.map((doc) => [...walk(doc)]), "
             "[...document.querySelectorAll('.tokens')].map((at) => at.textContent), "
             "describe(document.querySelector('.v').token)]);</script>")  # fmt: skip
    (tmp_path / "probe.html").write_text(text.replace("</body>", probe + "</body>"), encoding="utf-8")
    dom = browse(chromium, tmp_path / "probe.html", "--dump-dom")
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found
    walked, texts, described = json.loads(html.unescape(found[1]))
    reader, chat = ShardReader(folder / "set"), Chat(folder / "processor")
    documents = [document for row in report["shown"] for document in reader.read(row).documents]
    assert len(walked) == len(documents)
    for document, tokens in zip(documents, walked, strict=True):
        positions = multimodal_positions(document.tokens == chat.image_token, document.frames)
        assert sum(token["count"] for token in tokens) == len(document.tokens)
        for token in tokens:
            place, count = token["index"], token["count"]
            assert set(document.tokens[place : place + count].tolist()) == {token["id"]}
            assert set(document.loss_weights[place : place + count].tolist()) == {token["weight"]}
            area = positions[:, place : place + count]
            assert area.min(axis=1).tolist() == [token["cursor"]] * 3
            assert (area.max(axis=1) - token["cursor"]).tolist() == [0, token["rows"] - 1, token["columns"] - 1]
    assert any("Briefly, <b>please</b> & well." in shown for shown in texts)
    assert described.startswith("tokens ")
    assert '"<|image|>"' in described


def test_a_screenshot_has_all_colours(folder: Path, chromium: str, tmp_path: Path) -> None:
    page, shot = tmp_path / "page.html", tmp_path / "shot.png"
    inspect_rows.inspect_rows(folder / "set", page, rows="0-1")
    browse(chromium, page, f"--screenshot={shot}", "--window-size=1200,2400")
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(pixels) == 1200 * 2400
    for name, colour in {"trained": (185, 223, 203), "visual": (201, 219, 251), "time": (36, 87, 197), "paper": (255, 255, 255),
                         "badge": (253, 236, 234)}.items():  # fmt: skip
        near = (np.abs(pixels.astype(int) - colour) <= 6).all(axis=1)
        assert near.sum() > 150, name


def test_the_tool_lists_findings_and_is_strict(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "deep" / "page.html"
    command = ["inspect", str(folder / "set"), "--out", str(page), "--rows", "0"]
    assert cli.main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["findings"] == {"answer_format": 1, "placeholder_left": 1}
    assert report["linted"] == report["rows"] == len(ShardReader(folder / "set"))
    text = page.read_text(encoding="utf-8")
    assert "think_unclosed" in text
    for target in re.findall(r'href="#([^"]+)"', text):
        assert f'id="{target}"' in text, "a link to a row that is not on the page"
    assert text.count("<figure>") == text.count("data:image/jpeg;base64,")
    assert cli.main([*command, "--strict"]) == 1
    assert "1 answer_format" in capsys.readouterr().err
    assert cli.main([*command, "--strict", "--answers", "none"]) == 1
    assert "set: 1 placeholder_left; they are" in capsys.readouterr().err
    assert cli.main([*command[:-1], "99"]) == 1
    assert "the data set has rows 0 to" in capsys.readouterr().err


def test_fifty_long_rows_stay_a_page_that_opens(folder: Path) -> None:
    """Text only, the worst case: four bytes a token, two for the drawing; only documents that are open become elements."""
    index = ShardReader(folder / "set").index.model_copy(update={"length": 32_768})
    page = row_page.RowPage("long", index, Chat(folder / "processor"), 1, False)
    random = np.random.default_rng(0)
    for number in range(50):
        documents = []
        for place in range(8):
            tokens = random.integers(30, 300, 4096).astype(np.int32)
            documents.append(Document(tokens, (random.random(4096) < 0.01).astype(np.float32), (), f"s-{number}-{place}"))
        page.add(number, StoredRow(f"row-{number}", tuple(documents), ((),) * 8, ((),) * 8), [])
    text = page.html([], [], "no row")
    assert len(text) < 6 * 50 * 32_768
    assert text.count(" open>") <= 2


@pytest.fixture(scope="module")
def checked(folder: Path) -> tuple[Linter, Chat, Document]:
    chat = Chat(folder / "processor")
    sample = parse_sample(talk("good", ("image", "0.jpg")), "good", folder)
    return Linter(ShardReader(folder / "set").index, chat), chat, chat.encode(sample, [Grid(1, 4, 6)])


def change(document: Document, **changes: Any) -> Document:
    return replace(document, **changes)


def faulty(document: Document, chat: Chat) -> dict[str, Document]:
    """A document of every fault of one."""
    tokens, weights = document.tokens, document.loss_weights
    image = int(np.flatnonzero(tokens == chat.image_token)[0])
    literal = np.array(chat.tokenizer("<image>", add_special_tokens=False)["input_ids"], dtype=np.int32)
    stopless = np.where(tokens == chat.pad_token, 0, weights).astype(np.float32)
    return {
        "media_count": change(document, frames=()),
        "visual_tokens": change(document, frames=((4, 8),)),
        "frame_odd": change(document, frames=((3, 8),)),
        "placeholder_left": change(document, tokens=np.concatenate([literal, tokens]),
                                   loss_weights=np.concatenate([np.zeros(len(literal)), weights])),
        "visual_trained": change(document, loss_weights=np.where(np.arange(len(tokens)) == image, 1, weights)),
        "weight_invalid": change(document, loss_weights=np.where(weights > 0, np.nan, 0)),
        "nothing_trained": change(document, loss_weights=np.zeros_like(weights)),
        "everything_trained": change(document, tokens=tokens[tokens != chat.image_token], frames=(),
                                     loss_weights=np.ones(int((tokens != chat.image_token).sum()))),
        "no_stop_trained": change(document, loss_weights=stopless),
    }  # fmt: skip


def test_every_fault_is_found_and_a_good_document_has_none(checked: tuple[Linter, Chat, Document]) -> None:
    linter, chat, document = checked
    cases = faulty(document, chat)
    row = StoredRow("row", (document, *cases.values()), ((),) * (len(cases) + 1), None)
    found = [(finding.document, finding.code) for finding in linter.check(7, row) if finding.code != "row_too_long"]
    assert found == [(place, code) for place, code in enumerate(cases, start=1)]
    too_long = StoredRow("row", (document,) * 40, ((),) * 40, None)
    assert [(finding.document, finding.code) for finding in linter.check(7, too_long)] == [(-1, "row_too_long")]
    assert {*cases, "row_too_long", "row_unreadable", "answer_format"} == set(LINTS)


@pytest.mark.parametrize(
    ("answer", "answers", "faults"),
    [(FINE, "all", None), ("11", "tagged", None), ("11", "all", "think_missing"), ("11", "none", None),
     (FINE + FINE, "tagged", "think_repeated"), (FINE.replace("<|end_of_box|>", ""), "tagged", "box_unclosed"),
     ("<|begin_of_box|>11<|end_of_box|>", "tagged", None)],
)  # fmt: skip
def test_answers_are_held_to_their_form(
    checked: tuple[Linter, Chat, Document], folder: Path, answer: str, answers: Any, faults: str | None
) -> None:
    _, chat, _ = checked
    linter = Linter(ShardReader(folder / "set").index, chat, answers)
    document = chat.encode(parse_sample(talk("asked", answer=answer), "asked", folder), [])
    found = list(linter.check(0, StoredRow("row", (document,), ((),), None)))
    assert [finding.code for finding in found] == (["answer_format"] if faults else [])
    assert not faults or faults in found[0].detail


def test_an_unreadable_row_is_a_finding(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "set"
    copy.mkdir()
    for path in (folder / "set").glob("*.*"):
        (copy / path.name).write_bytes(path.read_bytes())
    tar = next(copy.glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[600:640] = b"x" * 40
    tar.write_bytes(bytes(data))
    report = inspect_rows.inspect_rows(copy, tmp_path / "page.html", rows="0,1")
    assert report["findings"]["row_unreadable"] == 1
    assert "not a packed row" in (tmp_path / "page.html").read_text(encoding="utf-8")
