"""Boxes in GLM's convention, and pages whose lines stand where their boxes say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools import cli
from data_tools.grounding import insert_boxes, scale_box
from tests.data_tools.fuzzed import contents, jpeg

NAN = float("nan")


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([0, 0, 200, 100], [0, 0, 999, 999]),
        ([20, 10, 100, 50], [100, 100, 500, 500]),
        ([-30, -5, 100, 50], [0, 0, 500, 500]),
        ([150, 50, 999, 999], [750, 500, 999, 999]),
        ([100, 50, 20, 10], None),
        ([20, 10, 20.05, 50], None),
        ([300, 10, 400, 50], None),
        ([NAN, 0, 1, 1], None),
        ([0, 0, float("inf"), 50], None),
    ],
)
def test_boxes_are_per_mille_of_the_picture(box: list[float], expected: list[int] | None) -> None:
    assert scale_box(box, 200, 100) == expected


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(out.glob("samples*")) for line in path.read_text().splitlines()]


def test_coco_and_phrases_become_conversations(tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "0.jpg").write_bytes(jpeg(0, 100, 200))
    coco = {
        "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}],
        "images": [{"id": number, "file_name": "i/0.jpg", "width": 200, "height": 100} for number in (11, 12, 13)],
        "annotations": [
            {"image_id": 11, "category_id": 3, "bbox": [20, 10, 80, 40]},
            {"image_id": 11, "category_id": 4, "bbox": [0, 0, 20, 10]},
            {"image_id": 11, "category_id": 3, "bbox": [100, 0, 100, 100]},
            {"image_id": 11, "category_id": 3, "bbox": [20, 10, 80, 40]},
            {"image_id": 11, "category_id": 4, "bbox": [0, 0, 90, 90], "iscrowd": 1},
            {"image_id": 12, "category_id": 3, "bbox": [20, 10, 80, 40]},
            {"image_id": 12, "category_id": 3, "bbox": [20, 10, 0, 40]},
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    assert cli.main(["grounding", str(tmp_path / "coco.json"), str(tmp_path / "out"), "--workers", "1", "--chunk", "2"]) == 0
    (sample,) = read(tmp_path / "out")
    assert sample["id"] == "11"
    assert [turn["content"] for turn in sample["messages"][1::2]] == [
        "<|begin_of_box|>[[100,100,500,500],[500,0,999,999]]<|end_of_box|>", "<|begin_of_box|>[[0,0,100,100]]<|end_of_box|>",
    ]  # fmt: skip
    assert [item["type"] for item in sample["messages"][0]["content"]] == ["image", "text"]
    assert "cat" in sample["messages"][0]["content"][1]["text"]
    assert "dog" in sample["messages"][2]["content"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dropped"] == {"boxes_few": 2}
    found = {"the cat": [[1, 2, 3, 4]], "a Dog": [[5, 6, 7, 8]], "tree": [[9, 9, 10, 10]], "cat": [[1, 1, 2, 2]]}
    box = "<|begin_of_box|>[[{}]]<|end_of_box|>"
    assert insert_boxes("A dog and the cat play.", found) == (
        f"A dog {box.format('5,6,7,8')} and the cat {box.format('1,2,3,4')} play.")  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    words = np.random.default_rng(0).choice(
        ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota"], (60, 8)
    )
    (folder / "text.txt").write_text("\n".join(" ".join(line) for line in words), encoding="utf-8")
    render(folder, folder / "out", "--chunk", "10")
    return folder


def render(folder: Path, out: Path, *more: str) -> None:
    arguments = [
        "render-ocr",
        str(out),
        "--text",
        str(folder / "text.txt"),
        "--count",
        "30",
        "--locate",
        "0.4",
        "--workers",
        "1",
    ]
    assert cli.main([*arguments, *more]) == 0


def test_lines_stand_where_their_boxes_say(pages: Path) -> None:
    samples = read(pages / "out")
    assert len(samples) == 30
    text = set((pages / "text.txt").read_text().split())
    asks = 0
    for sample in samples:
        with Image.open(pages / "out" / sample["messages"][0]["content"][0]["image"]) as opened:
            grey = np.asarray(opened.convert("L"), dtype=float)
        edges = np.abs(np.diff(grey, axis=1))
        inside = np.zeros_like(edges, dtype=bool)
        for line in sample["lines"]:
            x1, y1, x2, y2 = line["box"]
            assert 0 <= x1 < x2 <= grey.shape[1]
            assert 0 <= y1 < y2 <= grey.shape[0]
            assert set(line["text"].split()) <= text
            # Ink begins at the box's left edge and ends at its right one.
            strong = edges[y1:y2, max(0, x1 - 3) : x2 + 3].max(axis=0) > 30
            assert strong[:8].any()
            assert strong[-8:].any()
            inside[max(0, y1 - 2) : y2 + 2, max(0, x1 - 3) : x2 + 3] = True
        # Backgrounds are soft; nearly all sharp edges are letters.
        assert (edges[~inside] > 60).mean() < 0.002
        question, answer = sample["messages"][0]["content"][1]["text"], sample["messages"][1]["content"]
        if answer.startswith("<|begin_of_box|>"):
            asks += 1
            (box,) = json.loads(answer.removeprefix("<|begin_of_box|>").removesuffix("<|end_of_box|>"))
            wanted = re.search("“(.*)”", question)
            assert wanted
            (line,) = [line for line in sample["lines"] if line["text"] == wanted[1]]
            height, width = grey.shape
            assert box == [
                min(999, round(1000 * edge / size)) for edge, size in zip(line["box"], (width, height) * 2, strict=True)
            ]
        else:
            assert answer == "\n".join(line["text"] for line in sample["lines"])
    assert 4 <= asks <= 20


def test_pages_do_not_depend_on_chunks_or_parts(pages: Path, tmp_path: Path) -> None:
    render(pages, tmp_path / "chunks", "--chunk", "7")
    for part in ("1/2", "0/2"):
        render(pages, tmp_path / "parts", "--chunk", "10", "--part", part)
    assert contents(tmp_path / "parts") == contents(pages / "out")
    a, b = ([(sample["id"], sample["lines"]) for sample in read(out)] for out in (pages / "out", tmp_path / "chunks"))
    assert a == b
