"""Packing on disk: rows read back as the samples they came from, reports add up, bad samples are named, runs continue."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools import cli, digits, pack, pack_rows
from data_tools.corpus import reader
from data_tools.corpus.faults import Fault
from data_tools.corpus.job import JobStopped, Part
from data_tools.corpus.media import MediaRef, Place
from data_tools.corpus.reader import CorpusError
from data_tools.headers import plan_medium
from data_tools.pack_rows import RowSettings
from megatron_glmv.config.data import DataConfig
from megatron_glmv.config.model import ModelConfig
from megatron_glmv.data.chat import Chat
from megatron_glmv.data.index import check_compatible
from megatron_glmv.data.loader import RowStream
from megatron_glmv.data.sample import SampleError, parse_sample
from megatron_glmv.data.shard_reader import ShardReader
from megatron_glmv.data.videos import plan_video, read_video_header
from megatron_glmv.sequence.grid import image_grid
from tests.data.clips import clip
from tests.data.pictures import draw, encode, kinds, rotated_exif
from tests.data.processor import write_processor

VARIABLE = ("seconds", "worker_seconds")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    digits.write_digits(folder / "raw", digits.Plan(0, 120, 20, digits.DEFAULT_MIXTURE, 8))
    write_processor(folder / "processor", min_pixels=1568)
    return folder


@pytest.fixture(scope="module")
def plan(base: Path) -> pack.Plan:
    return pack.Plan((base / "raw" / "train.jsonl", base / "raw" / "eval.jsonl"), RowSettings(base / "processor", 256, 4))


@pytest.fixture
def chunks_of_32(monkeypatch: pytest.MonkeyPatch) -> None:
    _, *rest = reader.list_chunks.__defaults__
    monkeypatch.setattr(reader.list_chunks, "__defaults__", (32, *rest))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in VARIABLE}


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def ask(key: str, *pictures: str, answer: str = "4 0 7", kind: str = "image") -> dict[str, Any]:
    shown = [{"type": kind, kind: picture} for picture in pictures]
    return {"id": key, "messages": [{"role": "user", "content": [*shown, {"type": "text", "text": "Read the digits."}]},
                                    {"role": "assistant", "content": answer}]}  # fmt: skip


def keys_of(folder: Path) -> list[str]:
    rows = ShardReader(folder)
    return [document.key for row in range(len(rows)) for document in rows.read(row).documents]


def test_rows_hold_every_sample_once_as_it_was(plan: pack.Plan, tmp_path: Path) -> None:
    report = pack.pack_samples(plan, tmp_path / "set", num_workers=1)
    reader, chat = ShardReader(tmp_path / "set"), Chat(plan.rows.processor)
    check_compatible(reader.index, "set", ModelConfig(preset="digits").shape, sequence_length=256, align=4)
    rows = [reader.read(row) for row in range(len(reader))]
    found = {document.key: (document, media, data) for row in rows for document, media, data in
             zip(row.documents, row.media, row.data or (), strict=True)}  # fmt: skip
    tokens = patches = trained = num_videos = 0
    for path in plan.inputs:
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = parse_sample(line, "", path.parent)
            record = json.loads(line)
            (medium,) = sample.media()
            original = (path.parent / medium.value).read_bytes()
            is_video = medium.kind == "video"
            video = plan_video(read_video_header(original), chat.video) if is_video else None
            grid = video.grid if video else image_grid(record["height"], record["width"], chat.image.limits)
            expected = chat.encode(sample, [video or grid])
            document, media, data = found.pop(sample.key)
            np.testing.assert_array_equal(document.tokens, expected.tokens)
            np.testing.assert_array_equal(document.loss_weights, expected.loss_weights)
            num_frames = len(record["digits"]) if is_video else 1
            assert document.frames == ((record["height"] // 14, record["width"] // 14),) * num_frames
            assert (media[0].height, media[0].width) == (record["height"], record["width"])
            assert data[0] == original
            num_videos += is_video
            tokens, patches = tokens + len(expected.tokens), patches + grid.num_patches
            trained += int(expected.loss_weights.sum())
    assert not found
    assert num_videos > 1
    counts = {key: report[key] for key in ("samples", "kept", "rows", "tokens", "patches", "trained", "dropped", "faults")}
    assert counts == {"samples": 140, "kept": 140, "rows": len(rows), "tokens": tokens, "patches": patches,
                      "trained": trained, "dropped": {}, "faults": 0}  # fmt: skip
    assert report["fill"] == round(tokens / (len(rows) * 256), 4) > 0.85
    assert json.loads((tmp_path / "set" / "report.json").read_text()) == report
    assert not (tmp_path / "set.partial").exists()
    copied = {path.name: path.read_bytes() for path in (tmp_path / "set" / "processor").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in plan.rows.processor.iterdir()}


@pytest.mark.usefixtures("chunks_of_32")
def test_windows_and_interruptions_do_not_change_the_rows(
    plan: pack.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while measuring, and then behind each complete shard while writing, a run ends with the same bytes."""
    monkeypatch.setattr(pack_rows, "WINDOW", 64)
    # A megabyte a shard at least: shards of 20 kB come from a smaller unit.
    small = replace(plan, rows=replace(plan.rows, shard_mib=1))
    writer = pack_rows.ShardWriter
    monkeypatch.setattr(pack_rows, "ShardWriter", lambda *args, **kw: writer(*args, **kw | {"shard_bytes": 20_000}))
    once = pack.pack_samples(small, tmp_path / "once", num_workers=1)
    assert once["fill"] > 0.8
    lines = [line for path in plan.inputs for line in path.read_text(encoding="utf-8").splitlines()]
    assert sorted(keys_of(tmp_path / "once")) == sorted(json.loads(line)["id"] for line in lines)
    num_shards = len(list((tmp_path / "once").glob("*.tar")))
    assert num_shards > 3
    calls: list[int] = []
    with monkeypatch.context() as patched:
        measure = pack.Measuring.__call__

        def stop_at_third(self: pack.Measuring, chunk: reader.Chunk, folder: Path) -> Any:
            calls.append(chunk.number)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return measure(self, chunk, folder)

        patched.setattr(pack.Measuring, "__call__", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            pack.pack_samples(small, tmp_path / "twice", num_workers=1)
        with pytest.raises(KeyboardInterrupt), patched.context() as stopped:
            stopped.setattr(writer, "write", stopping(writer.write, 9))
            pack.pack_samples(small, tmp_path / "twice", num_workers=1)
    assert calls == [0, 1, 2, 2, 3, 4]
    partial = tmp_path / "twice.partial"
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.rows.npy")}
    assert before
    assert not (tmp_path / "twice").exists()
    assert without_times(pack.pack_samples(small, tmp_path / "twice", num_workers=1)) == without_times(once)
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")
    assert {name: (tmp_path / "twice" / name).stat().st_mtime_ns for name in before} == before


def stopping(write: Any, after: int) -> Any:
    calls: list[int] = []

    def stop(self: Any, *args: Any) -> None:
        calls.append(0)
        if len(calls) > after:
            raise KeyboardInterrupt
        write(self, *args)

    return stop


@pytest.mark.usefixtures("chunks_of_32")
def test_parts_pack_their_share_and_the_last_joins(plan: pack.Plan, tmp_path: Path) -> None:
    whole = pack.pack_samples(plan, tmp_path / "whole", num_workers=1)
    reports = [pack.pack_samples(plan, tmp_path / "set", 1, Part(number, 3)) for number in (2, 0, 1)]
    assert [report["complete"] for report in reports] == [False, False, True]
    assert sorted(keys_of(tmp_path / "set")) == sorted(keys_of(tmp_path / "whole"))
    for key in ("samples", "kept", "tokens", "patches", "trained", "dropped"):
        assert reports[-1][key] == whole[key]
    rows = ShardReader(tmp_path / "set")
    assert len({rows.read(row).key for row in range(len(rows))}) == len(rows) == reports[-1]["rows"]
    assert sorted(path.name for path in (tmp_path / "set").glob("*.tar")) == [f"shard-{part}-00000.tar" for part in range(3)]
    with pytest.raises(CorpusError, match="made with other parts"):
        pack.pack_samples(plan, tmp_path / "set", 1, Part(0, 2))


def test_a_second_start_leaves_the_shards_of_the_first_alone(
    plan: pack.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun while the first is in the middle of a shard, also with other rows, which remove those of an interrupted run."""
    monkeypatch.setattr(pack_rows, "WINDOW", 64)
    expected = pack.pack_samples(plan, tmp_path / "once", num_workers=1)
    load, again = pack_rows.RowPacking._load, [plan, replace(plan, rows=replace(plan.rows, length=300))]

    def start_again(self: pack_rows.RowPacking, row: pack_rows.PlannedRow, late: list[Any]) -> Any:
        found = load(self, row, late)
        if again and list(tmp_path.glob("set.partial/shard-*.tar")):
            other = again.pop()
            with pytest.raises(CorpusError, match=r"set\.partial: this job is being done by process"):
                pack.pack_samples(other, tmp_path / "set", num_workers=1)
        return found

    monkeypatch.setattr(pack_rows.RowPacking, "_load", start_again)
    report = pack.pack_samples(plan, tmp_path / "set", num_workers=1)
    assert not again
    assert without_times(report) == without_times(expected)
    assert contents(tmp_path / "set") == contents(tmp_path / "once")
    assert {path.name for path in (tmp_path / "set").iterdir()} == {path.name for path in (tmp_path / "once").iterdir()}


def test_a_killed_command_is_repeated_and_writes_the_same(plan: pack.Plan, tmp_path: Path) -> None:
    """By kill -9 in the middle of the work, at a moment that the machine chooses."""
    command = [sys.executable, "-m", "data_tools", "pack", *map(str, plan.inputs), str(tmp_path / "set"), "--processor",
               str(plan.rows.processor), "--length", "256", "--align", "4", "--workers", "1", "--decode"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("set.partial/*/*")) and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "set").exists()
    decoding = replace(plan, decode=True)
    again = pack.pack_samples(decoding, tmp_path / "set", num_workers=1)
    once = pack.pack_samples(decoding, tmp_path / "once", num_workers=1)
    assert without_times(again) == without_times(once)
    assert contents(tmp_path / "set") == contents(tmp_path / "once")


def test_a_complete_folder_is_reused_or_refused(plan: pack.Plan, tmp_path: Path) -> None:
    report = pack.pack_samples(plan, tmp_path / "set", num_workers=1)
    again = pack.pack_samples(plan, tmp_path / "set")
    assert again == report | {"reused": True}
    with pytest.raises(CorpusError, match="set: made with other length; remove it"):
        pack.pack_samples(replace(plan, rows=replace(plan.rows, length=300)), tmp_path / "set")
    (tmp_path / "other").mkdir()
    with pytest.raises(CorpusError, match="other: exists and is no output"):
        pack.pack_samples(plan, tmp_path / "other")


def test_a_limit_on_patches_is_kept(plan: pack.Plan, tmp_path: Path) -> None:
    report = pack.pack_samples(replace(plan, rows=replace(plan.rows, max_patches=96)), tmp_path / "set", num_workers=1)
    reader = ShardReader(tmp_path / "set")
    patches = [reader.measures(row)["patches"] for row in range(len(reader))]
    assert max(patches) == report["largest_patches"] <= 96
    assert sum(patches) == report["patches"]
    assert sum(patches) / len(patches) > 0.9 * 96


@pytest.fixture
def mixed(base: Path, tmp_path: Path) -> Path:
    """Good samples among one of every kind that cannot be packed."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    picture = (base / "raw" / "images" / "train" / "000000.png").read_bytes()
    bomb = bytearray(encode(Image.new("1", (8, 8))))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    files = {
        "a.png": picture, "cut.png": picture[:-200], "text.png": b"no picture", "empty.png": b"",
        "narrow.png": encode(Image.new("L", (2, 900))), "bomb.png": bytes(bomb),
        "really-a-jpeg.png": encode(draw(60, 60), "JPEG"),
        "cut.jpg": encode(draw(60, 60), "JPEG")[:-900], "empty.mp4": b"", "cut.mp4": clip()[:-3000], "a.mp4": clip(),
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (tmp_path / "secret.png").write_bytes(picture)
    lines = [ask("good-1", "a.png"), ask("cut", "cut.png"), ask("text", "text.png"), ask("gone", "gone.png"), "\n",
             ask("narrow", "narrow.png"), ask("marker", answer="<|user|>"), "{\n", ask("long", "a.png", answer="4" * 300),
             ask("good-2", "a.png", "a.png"), ask("good-3"), ask("good-1", "a.png"), ask("good-3", answer="another"),
             ask("bomb", "bomb.png"), ask("misnamed", "really-a-jpeg.png"), ask("cut-jpeg", "cut.jpg"),
             ask("outside", "../secret.png"), ask("empty", "empty.png"), ask("zero", "empty.mp4", kind="video"),
             ask("cut-video", "cut.mp4", kind="video"), ask("picture-as-video", "a.png", kind="video"),
             '{"id": "nan", "messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": NaN}]}\n',
             ask("video", "a.mp4", kind="video")]  # fmt: skip
    return write_lines(folder / "mixed.jsonl", lines)


FAULTS = {"cut": "image_broken", "text": "media_wrong_type", "gone": "media_missing", "narrow": "image_too_narrow",
          "marker": "sample_invalid", "mixed.jsonl:8": "json_invalid", "good-1": "key_duplicate", "bomb": "image_bomb",
          "cut-jpeg": "image_broken", "outside": "name_outside", "empty": "media_empty", "zero": "media_empty",
          "cut-video": "video_broken", "picture-as-video": "media_wrong_type",
          "nan": "text_not_a_string", "long": "longer_than_row"}  # fmt: skip


def test_bad_samples_are_counted_named_and_left_out(mixed: Path, base: Path, tmp_path: Path) -> None:
    plan = pack.Plan((mixed,), RowSettings(base / "processor", 256, skip_long=True), max_bad_share=1)
    report = pack.pack_samples(plan, tmp_path / "set", num_workers=1)
    dropped = [json.loads(line) for line in (tmp_path / "set" / "dropped.jsonl").read_text().splitlines()]
    assert {entry["key"]: entry["reason"] for entry in dropped} == FAULTS
    assert all(entry["source"].startswith("mixed.jsonl:") for entry in dropped)
    assert (report["samples"], report["kept"], report["faults"]) == (22, 6, 15)
    assert sum(report["dropped"].values()) == 16
    assert sorted(keys_of(tmp_path / "set")) == ["good-1", "good-2", "good-3", "good-3", "misnamed", "video"]
    assert not list(tmp_path.glob("**/*.partial"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "secret.png", "set"]


def test_a_video_is_packed_from_its_header(mixed: Path, base: Path, tmp_path: Path) -> None:
    lines = write_lines(mixed.with_name("video.jsonl"), [ask("video", "a.mp4", kind="video")])
    pack.pack_samples(pack.Plan((lines,), RowSettings(base / "processor", 256)), tmp_path / "set", num_workers=1)
    row = ShardReader(tmp_path / "set").read(0)
    (media,) = row.media[0]
    assert (media.kind, media.height, media.width, media.frame_indices) == ("video", 60, 100, (0, 5, 10, 15, 20, 25))
    assert len(row.documents[0].frames) == 3
    assert row.data is not None
    assert row.data[0][0] == (mixed.parent / "a.mp4").read_bytes()
    chat = Chat(base / "processor")
    text = chat.tokenizer.decode(row.documents[0].tokens)
    assert [text.count(f"<|end_of_image|>{second}") for second in (0, 1, 2)] == [1, 1, 1]


def test_tars_tables_and_lines_give_the_same_rows(base: Path, tmp_path: Path) -> None:
    """Pictures beside lines, in a tar, in a table's cells and in the lines: read once, stored as they were."""
    pictures = [encode(draw(60, 60 + 14 * number, number), "JPEG") for number in range(4)]
    turns = [ask(f"s{number}", "0.jpg")["messages"] for number in range(4)]
    plain, inline, tar, table = (tmp_path / name for name in ("plain.jsonl", "inline.jsonl", "set.tar", "set.parquet"))
    for number, picture in enumerate(pictures):
        (tmp_path / f"{number}.jpg").write_bytes(picture)
    write_lines(plain, [ask(f"s{number}", f"{number}.jpg") for number in range(4)])
    uris = ["data:image/jpeg;base64," + base64.b64encode(picture).decode() for picture in pictures]
    write_lines(inline, [ask(f"s{number}", uri) for number, uri in enumerate(uris)])
    with tarfile.open(tar, "w") as file:
        for number, picture in enumerate(pictures):
            text = json.dumps({"id": f"s{number}", "messages": json.loads(json.dumps(turns[number]).replace("0.jpg", "jpg"))})
            for name, data in ((f"s{number}.jpg", picture), (f"s{number}.json", text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    texts = [json.dumps([{"role": "user", "content": "<image>Read the digits."}, turn[-1]]) for turn in turns]
    cells = [[{"bytes": picture, "path": None}] for picture in pictures]
    pq.write_table(pa.table({"id": [f"s{n}" for n in range(4)], "messages": texts, "images": cells}), table)
    found = []
    for path in (plain, inline, tar, table):
        out = tmp_path / f"out-{path.name}"
        report = pack.pack_samples(pack.Plan((path,), RowSettings(base / "processor", 128)), out, num_workers=1)
        assert (report["kept"], report["faults"]) == (4, 0)
        found.append(contents(out))
    assert found[1:] == found[:1] * 3
    cut = tmp_path / "cut.tar"
    cut.write_bytes(tar.read_bytes()[:-12_000])
    plan = pack.Plan((cut,), RowSettings(base / "processor", 128), max_bad_share=1)
    assert pack.pack_samples(plan, tmp_path / "cut", num_workers=1)["dropped"]["tar_broken"] == 1
    assert set(keys_of(tmp_path / "cut")) < {"s0", "s1", "s2", "s3"}


def test_too_many_faults_stop_the_tool_and_long_samples_do(
    mixed: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pack", str(mixed), str(tmp_path / "set"), "--processor", str(base / "processor"), "--length", "256",
               "--workers", "1"]  # fmt: skip
    assert cli.main(command) == 1
    assert "glmv-data pack: 14 of 22 samples have faults, more than --max-bad-share 0.05" in capsys.readouterr().err
    assert cli.main([*command, "--max-bad-share", "1"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "sample 'long': longer than row: 3" in last
    assert "1 such samples in all" in last
    assert not (tmp_path / "set").exists()
    measured = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set.partial" / "measured").iterdir()}
    plan = pack.Plan((mixed,), RowSettings(base / "processor", 256), max_bad_share=0.1)
    with pytest.raises(JobStopped, match="image_broken"):
        pack.pack_samples(plan, tmp_path / "set", num_workers=1)
    assert measured == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set.partial" / "measured").iterdir()}
    assert cli.main([*command, "--max-bad-share", "1", "--skip-long"]) == 0, "what was measured serves other rows"


def test_a_picture_that_vanishes_before_it_is_written_is_a_fault(mixed: Path, base: Path, tmp_path: Path) -> None:
    lines = write_lines(mixed.with_name("two.jsonl"), [ask("kept", "a.png"), ask("lost", "really-a-jpeg.png")])
    plan = pack.Plan((lines,), RowSettings(base / "processor", 256), max_bad_share=1)
    gone = mixed.with_name("really-a-jpeg.png")
    load = pack_rows.RowPacking._load

    def vanish(self: pack_rows.RowPacking, *args: Any) -> Any:
        gone.unlink(missing_ok=True)
        return load(self, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pack_rows.RowPacking, "_load", vanish)
        report = pack.pack_samples(plan, tmp_path / "set", num_workers=1)
    assert (report["dropped"], keys_of(tmp_path / "set")) == ({"media_missing": 1}, ["kept"])


def test_every_kind_of_file_is_packed_so_that_the_loader_decodes_it(base: Path, tmp_path: Path) -> None:
    """Every kind of picture and video, from headers only: the loader finds the sizes that were planned, and no fault."""
    files = {**kinds(60, 100), "deep": encode(Image.fromarray(draw(60, 100)[..., 0].astype(np.uint16) * 257)),
             "gif": encode(Image.fromarray(draw(60, 100)).quantize(64), "GIF"),
             "tiff-rotated": encode(Image.fromarray(draw(60, 100)), "TIFF", exif=rotated_exif()),
             "jpeg-with-a-video-behind": encode(draw(60, 100), "JPEG") + clip()}  # fmt: skip
    lines = []
    for name, data in {**files, "clip": clip()}.items():
        (tmp_path / name).write_bytes(data)
        lines.append(ask(name, name, kind="video" if name == "clip" else "image"))
    path = write_lines(tmp_path / "kinds.jsonl", lines)
    report = pack.pack_samples(pack.Plan((path,), RowSettings(base / "processor", 256)), tmp_path / "set", num_workers=1)
    assert (report["kept"], report["faults"]) == (len(lines), 0)
    rows = ShardReader(tmp_path / "set")
    stored = [rows.read(row) for row in range(len(rows))]
    found = {document.key: media[0] for row in stored for document, media in zip(row.documents, row.media, strict=True)}
    turned = found["jpeg-rotated"]
    assert (turned.height, turned.width, turned.orientation) == (100, 60, 6)
    assert {key for key, media in found.items() if media.name.endswith("png") and not key.startswith("png")} == {
        "deep", "gif", "tiff-rotated"}  # fmt: skip
    config = DataConfig(sequence_length=256, sources=[{"name": "s", "path": tmp_path / "set"}], decode_device="cpu")
    stream = RowStream(config.sources, config, ModelConfig(preset="digits").shape, seed=0, global_batch_rows=len(rows),
                       data_rank=0, data_size=1, decode=True, align=8)  # fmt: skip
    assert stream.step(0).faults == ()
    stream.close()


def test_a_thumbnail_does_not_hide_that_a_picture_ends_early(base: Path) -> None:
    """The end of the thumbnail in a cut picture's EXIF data is no end of the picture."""
    exif, thumbnail = rotated_exif(1), encode(Image.new("L", (8, 8)), "JPEG")
    exif[0x927C] = thumbnail  # a maker's note
    whole = encode(draw(300, 400), "JPEG", quality=95, exif=exif)
    cut = whole[: len(whole) // 2]
    assert cut.count(b"\xff\xd9") == 1
    chat = Chat(base / "processor")
    for data in (whole, whole + bytes(5000)):
        plan_medium(MediaRef("image", "a.jpg", Place("file", "a.jpg"), data), chat)
    with pytest.raises(Fault, match="image_broken"):
        plan_medium(MediaRef("image", "a.jpg", Place("file", "a.jpg"), cut), chat)


def test_a_sample_longer_than_a_row_is_named(mixed: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=r"sample 'good-1': longer than row: 2. tokens, a row has 16; 5 such"):
        pack.pack_samples(pack.Plan((mixed,), RowSettings(base / "processor", 16), max_bad_share=1), tmp_path / "set", 1)
