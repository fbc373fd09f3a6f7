"""Histograms of packed data sets: the numbers are those of the rows, and the picture has six panels with something in them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import cli, stats
from megatron_glmv.data.shard_reader import ShardReader
from tests.data.rows import write_rows


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("stats")
    write_rows(base / "first", 30)
    write_rows(base / "text", 7, pictures=lambda row, number: [])
    return [base / "first", base / "text"]


def test_the_numbers_are_those_of_the_rows(sets: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stats", *map(str, sets), "--out", str(tmp_path / "out"), "--rows", "0"]) == 0
    assert [entry["rows"] for entry in json.loads(capsys.readouterr().out)["sets"]] == [30, 7]
    written = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["stats.json", "stats.png"]
    for folder, found in zip(sets, written["sets"], strict=True):
        reader = ShardReader(folder)
        rows = [reader.read(row) for row in range(len(reader))]
        documents = [document for row in rows for document in row.documents]
        trained = sum(int((document.loss_weights[1:] > 0).sum()) for document in documents)
        visual = sum(int((document.tokens == reader.index.tokens.image).sum()) for document in documents)
        tokens, whole = sum(len(document.tokens) for document in documents), len(rows) * reader.index.length
        expected = {"trained": trained, "masked text": tokens - trained - visual, "visual": visual, "padding": whole - tokens}
        assert found["shares"] == {name: pytest.approx(count / whole, abs=1e-6) for name, count in expected.items()}
        pictures = [len(media) for row in rows for media in row.media]
        assert found["modalities"] == {"text": pictures.count(0), "image": pictures.count(1),
                                       "images": sum(count > 1 for count in pictures), "video": 0, "mixed": 0}  # fmt: skip
        assert found["documents_read"] == len(documents)
        for name, histogram in found["histograms"].items():
            assert sum(histogram["counts"]) == (len(documents) if name == "lengths" else len(rows)), name
            assert len(histogram["edges"]) == len(histogram["counts"]) + 1
        assert found["histograms"]["lengths"]["quantiles"]["0.5"] == np.median([len(d.tokens) for d in documents])
        assert found["histograms"]["costs"]["mean"] == 1


def test_the_picture_has_six_panels(sets: list[Path], tmp_path: Path) -> None:
    stats.write_stats(sets, tmp_path)
    with Image.open(tmp_path / "stats.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    height, width = pixels.shape
    assert min(height, width) > 700
    for row in range(2):
        for column in range(3):
            panel = pixels[row * height // 2 : (row + 1) * height // 2, column * width // 3 : (column + 1) * width // 3]
            assert 0.01 < (panel < 250).mean() < 0.8
