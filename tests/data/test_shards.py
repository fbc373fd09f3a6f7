"""Packed shards: what is written is read back, and every kind of damage is one clear line at the start."""

from __future__ import annotations

import json
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from megatron_glmv.data import shard_reader
from megatron_glmv.data.index import ShardError, check_compatible, read_index
from megatron_glmv.data.media import Picture
from megatron_glmv.data.shard_reader import OPEN_SHARDS, ShardReader
from megatron_glmv.data.shard_writer import ShardWriter
from megatron_glmv.sequence.packed import Document
from tests.data.rows import LENGTH, LIMITS, SHAPE, default_pictures, document, write_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "set", 8, shard_bytes=40_000)
    return tmp_path / "set"


def make_writer(folder: Path) -> ShardWriter:
    return ShardWriter(
        folder, length=32, align=8, vocab_size=384, image_token=15, pad_token=1, image_limits=LIMITS, shard_bytes=1 << 20
    )


def test_rows_come_back(folder):
    reader = ShardReader(folder)
    assert len(reader) == 8
    assert len(reader.index.shards) > 2
    for row in range(8):
        stored = reader.read(row)
        assert stored.key == f"row-{row:08d}"
        for number in range(2):
            pictures = default_pictures(row, number)
            expected = document(f"s-{row}-{number}", pictures, 9 + row % 7, 100 * row + number)
            found = stored.documents[number]
            assert (found.key, found.frames) == (expected.key, expected.frames)
            assert np.array_equal(found.tokens, expected.tokens)
            assert np.array_equal(found.loss_weights, expected.loss_weights.astype(np.float32))
            assert stored.data[number] == tuple(picture.data for picture in pictures)
            sizes = [(media.height, media.width, media.size_bytes) for media in stored.media[number]]
            assert sizes == [(picture.height, picture.width, len(picture.data)) for picture in pictures]


def test_the_index_counts(folder):
    reader = ShardReader(folder)
    rows = [reader.read(row) for row in range(8)]
    tokens = [sum(len(document.tokens) for document in row.documents) for row in rows]
    patches = [sum(a * b for document in row.documents for a, b in document.frames) for row in rows]
    trained = [sum(int((document.loss_weights[1:] > 0).sum()) for document in row.documents) for row in rows]
    measures = [reader.measures(row) for row in range(8)]
    assert [m["tokens"] for m in measures] == tokens
    assert [m["patches"] for m in measures] == patches
    assert [m["trained"] for m in measures] == trained
    index = reader.index
    assert (index.num_rows, index.num_samples, index.num_tokens) == (8, 16, sum(tokens))
    assert (index.length, index.align, index.vocab_size) == (LENGTH, 8, 384)


def test_without_vision_only_the_head_is_read(folder):
    reader = ShardReader(folder)
    whole, head = reader.read(1), reader.read(1, media=False)
    assert head.data is None
    assert head.media == whole.media
    assert np.array_equal(head.documents[0].tokens, whole.documents[0].tokens)
    measures = reader.measures(1)
    assert measures["head_bytes"] < measures["total_bytes"]
    # Overwriting every byte after the head is not noticed, so none of them was read.
    shard = folder / reader.index.shards[0].file
    content = bytearray(shard.read_bytes())
    end = measures["offset"] + measures["total_bytes"]
    content[measures["offset"] + measures["head_bytes"] : end] = b"\xff" * (measures["total_bytes"] - measures["head_bytes"])
    shard.write_bytes(content)
    assert ShardReader(folder).read(1, media=False).key == "row-00000001"


def test_shards_are_plain_tars_with_adjacent_members(folder):
    names: list[str] = []
    for shard in read_index(folder).shards:
        with tarfile.open(folder / shard.file) as tar:
            names += tar.getnames()
    assert names[:6] == ["00000000.json", "00000000.tokens.npy", "00000000.weights.npy",
                         "00000000.000.png", "00000000.001.jpg", "00000000.002.png"]  # fmt: skip
    keys = [name.partition(".")[0] for name in names]
    assert keys == sorted(keys)
    assert len(set(names)) == len(names)


def test_writing_is_reproducible(tmp_path):
    for name in ("a", "b"):
        write_rows(tmp_path / name, 3)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_writing_again_leaves_nothing_old(tmp_path):
    write_rows(tmp_path, 12, shard_bytes=20_000)
    write_rows(tmp_path, 2)
    assert len(ShardReader(tmp_path)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "shard-00000.rows.npy", "shard-00000.tar"]


def test_reads_from_many_threads(tmp_path):
    """More shards than may be open at once, so files are closed while other threads read them."""
    num_rows = OPEN_SHARDS + 40
    write_rows(tmp_path, num_rows, pictures=lambda row, number: [], shard_bytes=1)
    reader = ShardReader(tmp_path)
    found: list[bool] = []

    def read(offset: int) -> None:
        for step in range(num_rows):
            row = (offset + 7 * step) % num_rows
            found.append(reader.read(row).documents[1].key == f"s-{row}-1")

    threads = [threading.Thread(target=read, args=(31 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * (4 * num_rows)


def test_a_row_outside_is_an_index_error(folder):
    for row in (-1, 8):
        with pytest.raises(IndexError, match=f"row {row} of 8"):
            ShardReader(folder).read(row)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("shard-00001.tar", lambda path: path.unlink(), r"shard-00001\.tar: the shard cannot be found .* copy it again"),
        ("shard-00001.tar", lambda path: path.write_bytes(path.read_bytes()[:-512]),
         r"shard-00001\.tar: \d+ bytes where the index says \d+; copy the shard again"),
        ("shard-00001.rows.npy", lambda path: path.unlink(), r"shard-00001\.rows\.npy: cannot be read .* copy it again"),
        ("shard-00001.rows.npy", lambda path: path.write_bytes(b""), r"shard-00001\.rows\.npy: cannot be read"),
        ("shard-00001.rows.npy", lambda path: np.save(path, np.zeros((1, 6), np.int64)), r"shard-00001\.rows\.npy: .*expected"),
        ("index.json", lambda path: path.unlink(), r"index\.json: no such file.*glmv-data pack"),
        ("index.json", lambda path: path.write_text("{"), r"index\.json: not JSON"),
        ("index.json", lambda path: path.write_text("[]"), r"index\.json: format and version are None"),
        ("index.json", lambda path: path.write_text(path.read_text().replace('"version": 3', '"version": 1')),
         r"index\.json: format and version are \('glmv-packed-rows', 1\)"),
        ("index.json", lambda path: path.write_text(path.read_text().replace('"length"', '"size"')), r"index\.json: .*length"),
        ("index.json", lambda path: path.write_text(path.read_text().replace('"num_rows": 8', '"num_rows": 9')),
         r"index\.json: num_rows is 9, the shards hold 8"),
    ],
)  # fmt: skip
def test_damage_is_one_line_at_the_start(folder, file, damage, message):
    damage(folder / file)
    with pytest.raises(ShardError, match=message) as caught:
        ShardReader(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_shards_beyond_those_checked_at_the_start_are_checked_when_first_read(folder, monkeypatch):
    monkeypatch.setattr(shard_reader, "CHECKED_SHARDS", 1)
    monkeypatch.setattr(shard_reader, "OPEN_TABLES", 1)
    rows = [ShardReader(folder).measures(row) for row in (7, 0, 7)]
    assert rows[0] == rows[2] != rows[1]
    reader = ShardReader(folder)
    lost = reader.index.shards[-1].file
    (folder / lost).unlink()
    reader = ShardReader(folder)
    reader.read(0)
    with pytest.raises(ShardError, match=f"{lost}: the shard cannot be found"):
        reader.read(7)


def test_a_shard_that_changes_under_a_reader(folder):
    reader = ShardReader(folder)
    shard = folder / reader.index.shards[0].file
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ShardError, match=r"shard-00000\.tar, row 0: only 700 of \d+ bytes"):
        reader.read(0)
    shard.write_bytes(bytes(read_index(folder).shards[0].size_bytes))
    with pytest.raises(ShardError, match=r"shard-00000\.tar, row 1: not a packed row .* copy the shard again"):
        reader.read(1)


@pytest.mark.parametrize("member", ["json", "tokens.npy", "weights.npy"])
def test_one_flipped_bit_in_what_is_trained_is_found(folder, member):
    """Media have checksums of their own, and a picture that does not decode is masked; a token would be trained on as it is."""
    shard = folder / read_index(folder).shards[0].file
    with tarfile.open(shard) as tar:
        found = tar.getmember(f"00000001.{member}")
        place = found.offset_data + found.size - 2
    damaged = bytearray(shard.read_bytes())
    damaged[place] ^= 1
    shard.write_bytes(damaged)
    reader = ShardReader(folder)
    reader.read(0)
    with pytest.raises(ShardError, match=r"shard-00000\.tar, row 1: not a packed row \(its bytes are not those written\)"):
        reader.read(1, media=False)


def test_an_unfinished_data_set_is_no_data_set(tmp_path):
    writer = make_writer(tmp_path)
    writer.write([Document(np.arange(20, 30), np.ones(10))], [[]])
    with pytest.raises(ShardError, match="no complete packed data set"):
        ShardReader(tmp_path)
    assert writer.close().num_rows == 1
    assert len(ShardReader(tmp_path)) == 1


def test_no_row_at_all(tmp_path):
    with pytest.raises(ShardError, match="no row to write"):
        make_writer(tmp_path).close()


@pytest.mark.parametrize(
    ("documents", "pictures", "message"),
    [
        ([], [], "a row needs documents"),
        ([Document(np.arange(20, 37), np.ones(17), (), "a"), Document(np.arange(20, 30), np.ones(10))], [[], []],
         r"row of 'a': 40 tokens \(rounded up to 8\) in a row of 32"),
        ([Document(np.array([20, 384]), np.ones(2), (), "a")], [[]], "'a': a token id outside the vocabulary of 384"),
        ([Document(np.array([20, -1]), np.ones(2), (), "a")], [[]], "'a': a token id outside the vocabulary"),
        ([Document(np.array([20, 30]), np.ones(3), (), "a")], [[]], "'a': 2 tokens but 3 weights"),
        ([Document(np.array([20, 30]), np.ones(2), (), "a")], [[Picture(b"x", "png", 1, 1)]], "'a': 1 pictures but 0 frames"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_written(tmp_path, documents, pictures, message):
    with pytest.raises(ShardError, match=message):
        make_writer(tmp_path).write(documents, pictures)


def test_odd_file_endings_do_not_reach_the_tar(tmp_path):
    writer = make_writer(tmp_path)
    writer.write([Document(np.array([11, 15, 12]), np.ones(3), ((2, 2),))], [[Picture(b"abc", "p/../ng", 28, 28)]])
    writer.close()
    assert ShardReader(tmp_path).read(0).media[0][0].name == "00000000.000.bin"


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"sequence_length": 64}, r"rows of 128 tokens do not fit data\.sequence_length 64; set .* to 128 or pack"),
        ({}, {"align": 16}, r"multiples of 8 tokens, this layout needs multiples of 16; pack again with --align 16"),
        ({"vocab_size": 151_552}, {}, "a vocabulary of 151552, the model has 384"),
        ({"tokens": {"image": 99, "pad": 1}}, {}, "image token 99, the model's is 15"),
        ({"tokens": {"image": 15, "pad": 0}}, {}, "pad token 0, the model's is 1"),
        ({"patch_size": 16}, {}, "patch size 16, the model's is 14"),
        ({"merge_size": 4}, {}, "merge size 4, the model's is 2"),
    ],
)
def test_a_data_set_of_another_model_or_layout(folder, change, arguments, message):
    tree = json.loads((folder / "index.json").read_text()) | change
    (folder / "index.json").write_text(json.dumps(tree))
    needs = {"sequence_length": LENGTH, "align": 4} | arguments
    with pytest.raises(ShardError, match=message) as caught:
        check_compatible(read_index(folder), "source 'x'", SHAPE, **needs)
    assert str(caught.value).startswith("source 'x': ")


def test_a_data_set_that_fits(folder):
    for align in (1, 2, 4, 8):
        check_compatible(read_index(folder), "source 'x'", SHAPE, sequence_length=LENGTH + 100, align=align)
