"""Packing on disk: rows read back as the samples they came from, reports add up, bad samples are named, runs continue."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools import cli, digits, measure, pack
from megatron_glmv.config.model import ModelConfig
from megatron_glmv.data.chat import Chat
from megatron_glmv.data.index import check_compatible
from megatron_glmv.data.sample import SampleError, parse_sample
from megatron_glmv.data.shards import ShardReader
from megatron_glmv.sequence.grid import image_grid
from tests.data.processor import write_processor


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    digits.write_digits(folder / "raw", digits.Plan(0, 120, 20, digits.DEFAULT_MIXTURE, 8))
    write_processor(folder / "processor", min_pixels=1568)
    return folder


@pytest.fixture(scope="module")
def plan(base: Path) -> pack.Plan:
    return pack.Plan((base / "raw" / "train.jsonl", base / "raw" / "eval.jsonl"), base / "processor", length=256, align=4)


@pytest.fixture
def chunks_of_32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.list_chunks, "__defaults__", (32,))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def ask(key: str, *pictures: str, answer: str = "4 0 7") -> dict[str, Any]:
    shown = [{"type": "image", "image": picture} for picture in pictures]
    return {"id": key, "messages": [{"role": "user", "content": [*shown, {"type": "text", "text": "Read the digits."}]},
                                    {"role": "assistant", "content": answer}]}  # fmt: skip


def test_rows_hold_every_sample_once_as_it_was(plan: pack.Plan, base: Path, tmp_path: Path) -> None:
    report = pack.pack_samples(plan, tmp_path / "set")
    reader, chat = ShardReader(tmp_path / "set"), Chat(plan.processor)
    check_compatible(reader.index, "set", ModelConfig(preset="digits").shape, sequence_length=256, align=4)
    rows = [reader.read(row) for row in range(len(reader))]
    found = {document.key: (document, media, data) for row in rows for document, media, data in
             zip(row.documents, row.media, row.data or (), strict=True)}  # fmt: skip
    tokens = patches = trained = 0
    for path in plan.inputs:
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = parse_sample(line, "", path.parent)
            record = json.loads(line)
            grid = image_grid(record["height"], record["width"], chat.image.limits)
            expected = chat.encode(sample, [grid])
            document, media, data = found.pop(sample.key)
            np.testing.assert_array_equal(document.tokens, expected.tokens)
            np.testing.assert_array_equal(document.loss_weights, expected.loss_weights)
            assert document.frames == ((record["height"] // 14, record["width"] // 14),)
            assert (media[0].height, media[0].width) == (record["height"], record["width"])
            assert data[0] == (path.parent / record["messages"][0]["content"][0]["image"]).read_bytes()
            tokens, patches = tokens + len(expected.tokens), patches + grid.num_patches
            trained += int(expected.loss_weights.sum())
    assert not found
    counts = {key: report[key] for key in ("samples", "rows", "tokens", "patches", "trained", "skipped")}
    assert counts == {
        "samples": 140,
        "rows": len(rows),
        "tokens": tokens,
        "patches": patches,
        "trained": trained,
        "skipped": {},
    }
    assert report["fill"] == round(tokens / (len(rows) * 256), 4) > 0.85
    assert json.loads((tmp_path / "set" / "report.json").read_text()) == report
    assert not (tmp_path / "set.partial").exists()
    copied = {path.name: path.read_bytes() for path in (tmp_path / "set" / "processor").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in plan.processor.iterdir()}


@pytest.mark.usefixtures("chunks_of_32")
def test_windows_workers_and_interruptions_do_not_change_the_rows(
    plan: pack.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "WINDOW", 2)
    once = pack.pack_samples(plan, tmp_path / "once")
    assert once["fill"] > 0.85
    reader = ShardReader(tmp_path / "once")
    keys = [document.key for row in range(len(reader)) for document in reader.read(row).documents]
    lines = [line for path in plan.inputs for line in path.read_text(encoding="utf-8").splitlines()]
    assert sorted(keys) == sorted(json.loads(line)["id"] for line in lines)
    with monkeypatch.context() as patched:
        calls: list[int] = []

        def stop_at_third(chunk: measure.Chunk, *rest: Any) -> list[measure.Skipped]:
            calls.append(chunk.number)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return measure.measure_chunk(chunk, *rest)

        patched.setattr(pack, "measure_chunk", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            pack.pack_samples(plan, tmp_path / "twice")
    measured = tmp_path / "twice.partial" / "measured"
    before = {path.name: path.stat().st_mtime_ns for path in measured.iterdir()}
    assert sorted(before) == ["000000.npz", "000001.npz"]
    chunks = measure.list_chunks(plan.inputs)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *args, **options: None)
        pack._prepare(tmp_path / "twice.partial", plan)
        pack._measure(chunks, plan, measured, num_workers=2)
    after = {path.name: path.stat().st_mtime_ns for path in measured.iterdir()}
    assert len(after) == len(chunks) == 5
    assert {name: after[name] for name in before} == before
    assert pack.pack_samples(plan, tmp_path / "twice") | {"seconds": 0} == once | {"seconds": 0}
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")


def test_a_complete_folder_is_reused_or_refused(plan: pack.Plan, tmp_path: Path) -> None:
    report = pack.pack_samples(plan, tmp_path / "set")
    again = pack.pack_samples(plan, tmp_path / "set")
    assert again == report | {"reused": True}
    with pytest.raises(ValueError, match="set: packed with other length; remove it"):
        pack.pack_samples(replace(plan, length=300), tmp_path / "set")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other: exists and is no data set"):
        pack.pack_samples(plan, tmp_path / "other")


def test_a_limit_on_patches_is_kept(plan: pack.Plan, tmp_path: Path) -> None:
    report = pack.pack_samples(replace(plan, max_patches=96), tmp_path / "set")
    reader = ShardReader(tmp_path / "set")
    patches = [reader.measures(row)["patches"] for row in range(len(reader))]
    assert max(patches) <= 96
    assert sum(patches) == report["patches"]
    assert sum(patches) / len(patches) > 0.9 * 96


@pytest.fixture
def mixed(base: Path, tmp_path: Path) -> Path:
    """Good samples among one of every kind that cannot be packed."""
    (tmp_path / "a.png").write_bytes((base / "raw" / "images" / "train" / "000000.png").read_bytes())
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-200])
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (2, 900)).save(tmp_path / "narrow.png")
    lines = [ask("good-1", "a.png"), ask("cut", "cut.png"), ask("text", "text.png"), ask("gone", "gone.png"), "\n",
             ask("narrow", "narrow.png"), ask("marker", answer="<|user|>"), "{\n", ask("long", "a.png", answer="4" * 300),
             ask("good-2", "a.png", "a.png"), ask("good-3")]  # fmt: skip
    return write_lines(tmp_path / "mixed.jsonl", lines)


def test_bad_samples_are_counted_named_and_left_out(mixed: Path, base: Path, tmp_path: Path) -> None:
    plan = pack.Plan((mixed,), base / "processor", length=256, skip_bad=True, skip_long=True)
    report = pack.pack_samples(plan, tmp_path / "set")
    assert report["skipped"] == {
        "a picture does not decode": 2, "a picture is missing": 1, "a picture is too narrow": 1,
        "a text holds a marker of the chat template": 1, "the line is not JSON": 1, "longer than a row": 1,
    }  # fmt: skip
    skipped = [json.loads(line) for line in (tmp_path / "set" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in skipped] == ["cut", "text", "gone", "narrow", "marker", "mixed.jsonl:8", "long"]
    row = ShardReader(tmp_path / "set").read(0)
    assert [document.key for document in row.documents] == ["good-1", "good-2", "good-3"]
    assert [len(media) for media in row.media] == [1, 2, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "sample 'cut': a picture does not decode: .*cut.png .*--skip-bad"),
     (["--skip-bad"], "sample 'long': longer than a row: 3.. tokens, a row has 256; raise --length, .*--skip-long")],
)  # fmt: skip
def test_a_bad_sample_stops_the_tool_by_default(
    mixed: Path, base: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pack", str(mixed), str(tmp_path / "set"), "--processor", str(base / "processor"), "--length", "256"]
    assert cli.main([*command, *arguments]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("glmv-data pack: ")
    with pytest.raises(SampleError, match=message):
        pack.pack_samples(pack.Plan((mixed,), base / "processor", 256, skip_bad=bool(arguments)), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_headers_are_enough_when_decoding_is_left_out(mixed: Path, base: Path, tmp_path: Path) -> None:
    plan = pack.Plan((mixed,), base / "processor", length=256, decode=False, skip_bad=True, skip_long=True)
    assert pack.pack_samples(plan, tmp_path / "set")["skipped"]["a picture does not decode"] == 1


def test_orientation_in_exif_is_not_applied(base: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (112, 56)).save(tmp_path / "turned.jpg", exif=exif)
    lines = write_lines(tmp_path / "turned.jsonl", [ask("turned", "turned.jpg")])
    pack.pack_samples(pack.Plan((lines,), base / "processor", length=128), tmp_path / "set")
    row = ShardReader(tmp_path / "set").read(0)
    assert row.documents[0].frames == ((4, 8),)
    assert (row.media[0][0].height, row.media[0][0].width) == (56, 112)
