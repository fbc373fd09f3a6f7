"""RowStream: the same bytes whatever happened before, bad pictures isolated and counted, and a thread that always ends."""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_glmv.config.data import DataConfig, SourceConfig
from megatron_glmv.data import row_media
from megatron_glmv.data.images import EncodedPicture, PictureDecoder
from megatron_glmv.data.index import COLUMNS, HEAD_MEMBERS, ShardError, join_crc32
from megatron_glmv.data.loader import DataError, RowStream, StepRows
from megatron_glmv.data.media import Clip, Picture
from megatron_glmv.data.shard_reader import ShardReader
from megatron_glmv.data.video_frames import EncodedVideo, VideoDecoder
from megatron_glmv.plan.flops import forward_flops
from megatron_glmv.sequence.packed import RowError, mask_documents
from megatron_glmv.sequence.patches import num_flat_patches
from tests.data import rows as rows_module
from tests.data.clips import broken_clips, clip
from tests.data.pictures import broken, draw, encode
from tests.data.rows import LENGTH, SHAPE, default_pictures, measure, measure_clip, mixed_media, write_rows


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[SourceConfig, ...]:
    """Two sources, of 11 rows with pictures and videos and of 5 with pictures, so that a few steps cross several epochs."""
    root = tmp_path_factory.mktemp("sources")
    write_rows(root / "reading", 11, pictures=mixed_media)
    write_rows(root / "counting", 5, name="c")
    return (
        SourceConfig(name="reading", path=root / "reading", weight=3.0),
        SourceConfig(name="counting", path=root / "counting"),
    )


@pytest.fixture
def open_stream():
    """Opens streams and closes them after the test."""
    streams = []

    def opened(sources, **changes) -> RowStream:
        keys = ("even_ranks", "sequence_length", "max_bad_share", "prefetch_rows", "decode_threads")
        data = {"sequence_length": LENGTH, "decode_threads": 1, "decode_device": "cpu"} | {
            key: changes.pop(key) for key in keys if key in changes
        }
        options = {"seed": 3, "global_batch_rows": 4, "data_rank": 0, "data_size": 1, "decode": True, "align": 2} | changes
        streams.append(RowStream(sources, DataConfig(sources=tuple(sources), **data), SHAPE, **options))
        return streams[-1]

    yield opened
    for stream in streams:
        stream.close()


def damaged(tmp_path: Path, bad: dict[tuple[int, int], bytes], num_rows: int = 6) -> SourceConfig:
    """A source whose pictures are as usual, but for those of `bad` (row, sample)."""

    def pictures(row: int, number: int) -> list[Picture]:
        return [Picture(bad[row, number], "jpg", 60, 100)] if (row, number) in bad else default_pictures(row, number)

    write_rows(tmp_path / "bad", num_rows, pictures=pictures, name="b")
    return SourceConfig(name="bad", path=tmp_path / "bad")


def contents(rows: StepRows | list) -> list[tuple[object, ...]]:
    """Everything a row holds, as plain values."""
    return [
        tuple(value.numpy().tobytes() if isinstance(value, torch.Tensor) else value for value in vars(row).values())
        for row in (rows.rows if isinstance(rows, StepRows) else rows)
    ]


def digest(rows: StepRows) -> str:
    return hashlib.sha256(repr(contents(rows)).encode()).hexdigest()


CHILD = """
import sys
from megatron_glmv.config.data import DataConfig, SourceConfig
from megatron_glmv.data.loader import RowStream
from tests.data.rows import SHAPE, LENGTH

sources = [SourceConfig(**source) for source in {sources}]
data = DataConfig(sources=sources, sequence_length=LENGTH, decode_threads=2, prefetch_rows={prefetch}, decode_device="cpu")
stream = RowStream(sources, data, SHAPE, seed=3, global_batch_rows=4, data_rank=0, data_size=1, decode=True, align=2)
"""
"""A process of its own that opens the stream that `open_stream` opens here."""
PRINT_STEPS = """
from tests.data.test_loader import digest
for step in range(100_000):
    print(step, digest(stream.step(step)), flush=True)
"""


def test_rows_are_complete(sources, open_stream):
    step = open_stream(sources).step(0)
    assert len(step.rows) == 4
    assert step.faults == ()
    for row in step.rows:
        assert row.tokens.shape == (LENGTH,)
        assert sum(row.document_lengths) == LENGTH
        assert all(length % 2 == 0 for length in row.document_lengths)
        assert row.patches.dtype == torch.uint8
        assert row.patches.shape == (num_flat_patches(row.frames, row.moving), 3 * 14 * 14)
        assert len(row.moving) == len(row.frames)
        assert len(row.visual_index) == row.num_patches // 4
        assert len(row.documents) == 2
        assert row.key.split("/")[0] in ("reading", "counting")


def test_patches_are_those_of_the_row(sources, open_stream):
    """Every picture and video stands where its document says: compared with decoding the stored bytes one by one."""
    pictures, videos = PictureDecoder(), VideoDecoder()
    reader = ShardReader(sources[0].path)
    kinds = set()
    for row in open_stream(sources[:1], shuffle=False, global_batch_rows=11).step(0).rows:
        stored = reader.read(int(row.key.split("-")[1]))
        start = frame = 0
        for document, media, data in zip(stored.documents, stored.media, stored.data, strict=True):
            own = iter(document.frames)
            for listed, content in zip(media, data, strict=True):
                frames = [next(own) for _ in range(listed.num_frames)]
                size = (frames[0][0] * 14, frames[0][1] * 14)
                measured = (listed.height, listed.width)
                if listed.kind == "image":
                    (patches,) = pictures.decode([EncodedPicture(content, size, measured)])
                else:
                    patches = videos.decode(EncodedVideo(content, size, measured, listed.frame_indices))
                assert torch.equal(row.patches[start : start + len(patches)], patches)
                assert row.moving[frame : frame + len(frames)].tolist() == [listed.kind == "video"] * len(frames)
                start, frame = start + len(patches), frame + len(frames)
                kinds.add(listed.name.rpartition(".")[2])
        assert (start, frame) == (len(row.patches), len(row.frames))
    assert kinds == {"png", "jpg", "mp4", "webm", "mkv"}
    videos.close()


def test_ranks_without_vision_get_the_same_rows_without_patches(sources, open_stream):
    seeing, blind = open_stream(sources), open_stream(sources, decode=False)
    for step in range(4):
        with_patches, without = seeing.step(step).rows, blind.step(step).rows
        for a, b in zip(with_patches, without, strict=True):
            assert b.patches is None
            assert [x for x in contents([a])[0] if not isinstance(x, bytes)][0:1] == [a.document_lengths]
            assert torch.equal(a.tokens, b.tokens)
            assert torch.equal(a.positions, b.positions)
            assert torch.equal(a.frames, b.frames)


def test_ranks_without_vision_never_touch_media(sources, open_stream, tmp_path):
    """Every byte of media is overwritten, and nobody notices."""
    write_rows(tmp_path / "set", 6)
    reader = ShardReader(tmp_path / "set")
    before = [reader.measures(row) for row in range(6)]
    row = 0
    for shard in reader.index.shards:
        path = tmp_path / "set" / shard.file
        content = bytearray(path.read_bytes())
        for measures in before[row : row + shard.rows]:
            start, end = measures["offset"] + measures["head_bytes"], measures["offset"] + measures["total_bytes"]
            content[start:end] = b"\xff" * (end - start)
        path.write_bytes(content)
        row += shard.rows
    stream = open_stream([SourceConfig(name="set", path=tmp_path / "set")], decode=False)
    assert all(row.patches is None for step in range(3) for row in stream.step(step).rows)


def test_any_start_gives_the_same_bytes(sources, open_stream):
    whole = open_stream(sources)
    steps = [contents(whole.step(step)) for step in range(12)]
    for first in (0, 1, 5, 11):
        stream = open_stream(sources, first_step=first, prefetch_rows=1 + first)
        for step in range(first, 12):
            assert contents(stream.step(step)) == steps[step]
        stream.close()


def test_any_number_of_replicas_and_threads_gives_the_same_bytes(sources, open_stream):
    """On 2 replicas, then 4, then 3, with other threads and depths each time: what each step reads together never changes."""
    whole = open_stream(sources, global_batch_rows=12)
    expected = {step: sorted(contents(whole.step(step))) for step in range(5)}
    found = {}
    for first, size in ((0, 2), (2, 4), (4, 3)):
        streams = [
            open_stream(sources, global_batch_rows=12, data_rank=rank, data_size=size, first_step=first,
                        decode_threads=1 + size % 3, prefetch_rows=size)
            for rank in range(size)
        ]  # fmt: skip
        for step in {first, min(first + 1, 4)}:
            found[step] = sorted(row for stream in streams for row in contents(stream.step(step)))
    assert found == expected


def test_replicas_take_rows_that_cost_alike(sources, open_stream):
    """The costs are counted anew from the rows themselves: operations of the whole row, padding included."""

    def operations(row):
        frames = [tuple(frame) for frame in row.frames.tolist()]
        return forward_flops(SHAPE, row.document_lengths, frames, row.num_trained).total

    def skew(even_ranks):
        streams = [open_stream(sources, global_batch_rows=12, data_rank=rank, data_size=2, even_ranks=even_ranks)
                   for rank in range(2)]  # fmt: skip
        worst = []
        for step in range(6):
            loads = [sum(operations(row) for row in stream.step(step).rows) for stream in streams]
            worst.append(max(loads) / (sum(loads) / 2))
        return sum(worst) / len(worst)

    in_order, dealt = skew(False), skew(True)
    assert dealt - 1 < (in_order - 1) / 3


def test_steps_may_jump(sources, open_stream):
    """Evaluation reads the same steps again and again, and a resumed run may jump."""
    straight = open_stream(sources, shuffle=False)
    steps = [contents(straight.step(step)) for step in range(6)]
    stream = open_stream(sources, shuffle=False)
    for step in (0, 1, 2, 0, 1, 2, 5, 5, 3, 4):
        assert contents(stream.step(step)) == steps[step]
    assert rows_threads() == 2


def test_killed_at_any_moment_and_resumed(sources, open_stream):
    """A process killed without warning leaves nothing behind that changes what the next one reads."""
    code = CHILD.format(sources=[source.model_dump(mode="json") for source in sources], prefetch=4) + PRINT_STEPS
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    lines = [child.stdout.readline().split() for _ in range(5)]
    child.kill()
    child.communicate()
    stream = open_stream(sources, first_step=3)
    for step in (3, 4):
        assert lines[step] == [str(step), digest(stream.step(step))]


def test_bad_pictures_are_grey_named_and_masked(tmp_path, open_stream):
    files = broken()
    source = damaged(tmp_path, {(0, 1): files["jpeg-half"], (2, 0): files["text"], (5, 1): files["empty"]})
    log = tmp_path / "logs" / "bad.jsonl"
    stream = open_stream([source], global_batch_rows=6, shuffle=False, fault_log=log)
    step = stream.step(0)
    found = [(fault.row, fault.document, fault.key) for fault in step.faults]
    assert found == [(0, 1, "b-0-1"), (2, 0, "b-2-0"), (5, 1, "b-5-1")]
    assert all("\n" not in fault.reason and ".jpg: " in fault.reason for fault in step.faults)
    for fault in step.faults:
        row = step.rows[fault.row]
        assert row.patches.shape[0] == row.num_patches
        grey = (row.patches == row_media.GREY).all(dim=1)
        # 60 x 100 pixels become 4 x 8 patches; the other sample's pictures stay as they are.
        assert int(grey.sum()) == 32
        others = [other for other in step.rows if other.key == row.key]
        assert len(others) == 1
        masked = mask_documents(row, [fault.document])
        assert masked.loss_weights.sum() < row.loss_weights.sum()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["sample"] for line in lines] == ["b-0-1", "b-2-0", "b-5-1"]
    assert lines[0] == {"step": 0, "source": "bad", "row": "row-00000000", "sample": "b-0-1", "reason": step.faults[0].reason}
    # The next epoch finds them again, the log names each once.
    assert [fault.key for fault in stream.step(1).faults] == ["b-0-1", "b-2-0", "b-5-1"]
    assert len(log.read_text().splitlines()) == 3


def test_bad_videos_are_grey_named_and_masked(tmp_path, open_stream, monkeypatch):
    """A video that was cut, replaced or is another than was measured, each beside a sound picture."""
    sound = measure_clip(clip(11, 56, 56, fps=6))
    files = {0: b"", 2: broken_clips()["mp4-faststart-half"], 3: clip(11, 60, 60, fps=6), 5: sound.data}

    def media(row, number):
        return [replace(sound, data=files[row]), *default_pictures(0, 1)] if row in files and not number else []

    frames = rows_module.frames_of
    monkeypatch.setattr(rows_module, "frames_of", lambda item: frames(sound if isinstance(item, Clip) else item))
    write_rows(tmp_path / "set", 6, pictures=media)
    source = SourceConfig(name="set", path=tmp_path / "set")
    step = open_stream([source], global_batch_rows=6, shuffle=False).step(0)
    assert [(fault.row, fault.document, fault.key) for fault in step.faults] == [
        (0, 0, "s-0-0"),
        (2, 0, "s-2-0"),
        (3, 0, "s-3-0"),
    ]
    assert "60 x 60 pixels, 56 x 56 were measured" in step.faults[2].reason
    good = step.rows[5]
    per_video = 4 * 16
    for fault in step.faults:
        row = step.rows[fault.row]
        assert row.patches.shape == good.patches.shape
        assert (row.patches[:per_video] == row_media.GREY).all()
        assert torch.equal(row.patches[per_video:], good.patches[per_video:])


def test_a_bad_picture_changes_nothing_else(tmp_path, open_stream):
    sound = [measure(encode(draw(60, 100, 7), "JPEG"), "jpg").data]
    good = damaged(tmp_path / "good", {(0, 1): sound[0]})
    bad = damaged(tmp_path / "broken", {(0, 1): broken()["noise"]})
    a = open_stream([good], global_batch_rows=6, shuffle=False).step(0)
    b = open_stream([bad], global_batch_rows=6, shuffle=False).step(0)
    assert contents(a)[1:] == contents(b)[1:]
    same = (a.rows[0].patches == b.rows[0].patches).all(dim=1)
    assert int((~same).sum()) == 32
    assert torch.equal(a.rows[0].tokens, b.rows[0].tokens)


def test_changed_bytes_are_a_fault(sources, open_stream, tmp_path):
    """A JPEG decoder takes flipped bits without complaint; only the checksum sees them."""
    write_rows(tmp_path / "set", 4, pictures=lambda row, number: [measure(encode(draw(60, 100, row), "JPEG"), "jpg")])
    reader = ShardReader(tmp_path / "set")
    picture = reader.read(2).data[1][0]
    shard = tmp_path / "set" / reader.index.shards[-1].file
    for entry in reader.index.shards:
        path = tmp_path / "set" / entry.file
        content = path.read_bytes()
        at = content.rfind(picture)
        if at >= 0:
            shard, middle = path, at + len(picture) // 2
    content = bytearray(shard.read_bytes())
    content[middle] ^= 0x10
    shard.write_bytes(content)
    (fault,) = open_stream([SourceConfig(name="s", path=tmp_path / "set")], shuffle=False).step(0).faults
    assert (fault.row, fault.document, fault.key) == (2, 1, "s-2-1")
    assert "crc32" in fault.reason


def test_too_many_bad_samples_stop_the_run(tmp_path, open_stream):
    bad = {(row, 0): broken()["text"] for row in range(11)}
    source = damaged(tmp_path, bad, num_rows=30)
    log = tmp_path / "bad.jsonl"
    stream = open_stream([source], global_batch_rows=1, shuffle=False, fault_log=log)
    for step in range(10):
        assert len(stream.step(step).faults) == 1
    message = r"11 of 22 samples .* data\.max_bad_share 0\.01 .* listed in .*bad\.jsonl"
    with pytest.raises(DataError, match=message):
        stream.step(10)
    assert len(log.read_text().splitlines()) == 11


def test_a_tolerated_share_of_bad_samples_does_not(tmp_path, open_stream):
    source = damaged(tmp_path, {(row, 0): broken()["text"] for row in range(0, 30, 2)}, num_rows=30)
    stream = open_stream([source], global_batch_rows=1, shuffle=False, max_bad_share=0.3)
    assert sum(len(stream.step(step).faults) for step in range(60)) == 30


def test_the_thread_raises_where_rows_are_asked_for(open_stream, tmp_path):
    write_rows(tmp_path / "set", 4)
    folder = tmp_path / "set"
    stream = open_stream([SourceConfig(name="set", path=folder)], shuffle=False, global_batch_rows=1, prefetch_rows=1)
    first = stream.step(0)
    for entry in ShardReader(folder).index.shards:
        (folder / entry.file).write_bytes(bytes(entry.size_bytes))
    assert first.rows[0].key == "set/row-00000000"
    with pytest.raises(ShardError, match=r"shard-0000\d\.tar, row \d: (not a packed row|only \d+ of)"):
        for step in range(1, 4):
            stream.step(step)


def test_every_layout_gets_the_same_rows(sources, open_stream):
    """Documents start where the data set was packed to have them, whatever alignment the layout needs."""
    narrow, wide = open_stream(sources, align=1).step(0).rows, open_stream(sources, align=4).step(0).rows
    assert any(
        end - start < length
        for row in narrow
        for (_, start, end), length in zip(row.documents, row.document_lengths, strict=False)
    )
    for first, second in zip(narrow, wide, strict=True):
        assert first.document_lengths == second.document_lengths
        assert torch.equal(first.tokens, second.tokens)
        assert torch.equal(first.positions, second.positions)


def test_sources_are_judged_before_any_row(sources, open_stream, tmp_path):
    with pytest.raises(ShardError, match=r"source 'reading' \(.*\): rows of 128 tokens do not fit data.sequence_length 96"):
        open_stream(sources, sequence_length=96)
    with pytest.raises(ShardError, match="this layout needs multiples of 16"):
        open_stream(sources, align=16)
    with pytest.raises(ShardError, match="no such file"):
        open_stream([SourceConfig(name="none", path=tmp_path)])
    with pytest.raises(ValueError, match="4 rows does not divide by 3 replicas"):
        open_stream(sources, data_size=3)
    assert not [thread for thread in threading.enumerate() if thread.name == "rows"]


def test_longer_rows_than_packed_only_pad(sources, open_stream):
    short, long = open_stream(sources).step(0), open_stream(sources, sequence_length=LENGTH + 72).step(0)
    for a, b in zip(short.rows, long.rows, strict=True):
        assert b.tokens.shape == (LENGTH + 72,)
        assert a.num_useful == b.num_useful
        assert torch.equal(a.patches, b.patches)


def test_a_row_that_contradicts_itself_names_its_sample(open_stream, tmp_path):
    """A picture whose grid needs other than the placeholders there are: refused by name, not trained on."""
    wrong = [Picture(measure(encode(draw(60, 100))).data, "png", 60, 100)]
    write_rows(tmp_path / "set", 2, pictures=lambda row, number: wrong)
    reader = ShardReader(tmp_path / "set")
    shard = reader.index.shards[0]
    path, index = tmp_path / "set" / shard.file, tmp_path / "set" / shard.index
    path.write_bytes(path.read_bytes().replace(b'"frames": [[4, 8]]', b'"frames": [[4, 6]]'))
    table = np.load(index)
    with tarfile.open(path) as tar:
        for row in range(2):
            contents = [tar.extractfile(f"{row:08d}.{suffix}").read() for suffix in HEAD_MEMBERS]
            table[row, COLUMNS.index("head_crc32")] = join_crc32(contents)
    np.save(index, table)
    with pytest.raises(RowError, match=r"row 'set/row-00000000', sample 's-0-0': a run of 8 visual tokens"):
        open_stream([SourceConfig(name="set", path=tmp_path / "set")], shuffle=False).step(0)


def test_prefetch_is_bounded_and_waiting_is_counted(sources, open_stream):
    stream = open_stream(sources, prefetch_rows=3)
    deadline = time.monotonic() + 20
    while len(stream._ahead._buffer) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(stream._ahead._buffer) == 3
    assert stream.wait_s == 0.0
    stream.step(0)
    assert stream.wait_s > 0.0


def rows_threads() -> int:
    return sum(thread.name == "rows" for thread in threading.enumerate())


def test_close_ends_the_thread(sources, open_stream):
    stream = open_stream(sources)
    stream.step(0)
    assert rows_threads() == 1
    stream.close()
    assert rows_threads() == 0
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        stream.step(1)


def test_a_dropped_stream_ends_its_thread(sources):
    data = DataConfig(sources=sources, sequence_length=LENGTH, decode_threads=1, decode_device="cpu")
    stream = RowStream(sources, data, SHAPE, seed=0, global_batch_rows=2, data_rank=0, data_size=1, decode=True, align=1)
    stream.step(0)
    del stream
    gc.collect()
    assert rows_threads() == 0


@pytest.mark.parametrize("ending", ["pass", "sys.exit(0)"])
def test_the_interpreter_ends_without_close(tmp_path, ending):
    """A thread inside DALI at that moment aborts the process with SIGABRT; large photos keep it there nearly all the time."""
    photo = measure(encode(draw(1_400, 1_400), "JPEG"), "jpg")
    write_rows(tmp_path, 2, pictures=lambda row, number: [photo])
    sources = [{"name": "photos", "path": str(tmp_path)}]
    code = CHILD.format(sources=sources, prefetch=1_000) + f"stream.step(0)\n{ending}\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
