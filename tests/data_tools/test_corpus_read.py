"""Every form of sample is read as the same conversation, and its media are found again from a saved reference."""

from __future__ import annotations

import base64
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.corpus import jsonl
from data_tools.corpus.checks import check_medium
from data_tools.corpus.faults import FAULTS, Dropped, Fault
from data_tools.corpus.formats import draft_sample
from data_tools.corpus.media import MediaRef, Place, Record
from data_tools.corpus.reader import CorpusError, list_chunks, read_media
from tests.data.pictures import draw, encode, rotated_exif
from tests.data_tools.fuzzed import clip, jpeg, write_tar

URI = "data:image/jpeg;base64," + base64.b64encode(jpeg(0)).decode()
ANSWER = {"role": "assistant", "content": "A drawing."}
WHAT = {"type": "text", "text": "What?"}
SAMPLES: dict[str, dict[str, Any]] = {
    "ours": {"messages": [{"role": "user", "content": [{"type": "image", "image": "i/0.jpg"}, WHAT]}, ANSWER]},
    "llava": {"image": "i/0.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                    {"from": "gpt", "value": "A drawing."}]},
    "openai": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "i/0.jpg"}},
                                                         WHAT]}, ANSWER]},
    "openai-data": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URI}},
                                                              WHAT]}, ANSWER]},
    "trl": {"images": ["i/0.jpg"], "messages": [{"role": "user", "content": [{"type": "image"}, WHAT]},
                                                {"role": "assistant", "content": [{"type": "text", "text": "A drawing."}]}]},
    "sharegpt": {"images": ["i/0.jpg"], "messages": [{"role": "user", "content": "<image>What?"}, ANSWER]},
}  # fmt: skip


def read_all(folder: Path, size: int = 3) -> list[Record | Dropped]:
    return [record for chunk in list_chunks([folder], size) for record in chunk.read()]


def describe(record: Record | Dropped) -> list[tuple[str, list[str]]]:
    assert isinstance(record, Record), record
    return [(message.role, [item.value if item.kind == "text" else item.kind for item in message.content])
            for message in record.sample.messages]  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "tar", "parquet"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_samples_of_every_form_are_one_conversation(sample: str, form: str, tmp_path: Path) -> None:
    tree = SAMPLES[sample] | {"id": "a", "source_url": "x"}
    if form == "jsonl":
        (tmp_path / "i").mkdir()
        (tmp_path / "i" / "0.jpg").write_bytes(jpeg(0))
        (tmp_path / "a.jsonl").write_text("\n" + json.dumps(tree))
    elif form == "tar":
        members = [] if sample == "openai-data" else [("x/0.jpg", jpeg(0))]
        text = json.dumps(tree).replace("i/0.jpg", "0.jpg")
        write_tar(tmp_path / "a.tar", [("x/0.json", text.encode()), *members])
    else:
        text = json.dumps({key: value for key, value in tree.items() if key not in ("image", "images")})
        row: dict[str, Any] = json.loads(text)
        if sample != "openai-data":
            row["images"] = [{"bytes": jpeg(0), "path": "i/0.jpg"}]
        for turn in row.get("messages", ()):
            if isinstance(turn["content"], list):
                turn["content"] = [
                    {"type": item["type"].replace("_url", "") if sample == "openai" else item["type"], "text": item.get("text"),
                     "image_url": item.get("image_url") if sample == "openai-data" else None}
                    for item in turn["content"]
                ]  # fmt: skip
            elif any(isinstance(other["content"], list) for other in row["messages"]):
                turn["content"] = [{"type": "text", "text": turn["content"], "image_url": None}]
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (record,) = read_all(tmp_path)
    assert describe(record) == [("user", ["image", "What?"]), ("assistant", ["A drawing."])]
    assert isinstance(record, Record)
    assert record.sample.key == "a"
    assert record.extra == {"source_url": "x"}
    (ref,) = record.media
    saved = MediaRef(ref.kind, ref.name, ref.place)
    assert read_media(ref) == read_media(saved) == jpeg(0)


def test_members_are_matched_by_name_extension_or_order(tmp_path: Path) -> None:
    def ask(*content: dict[str, str]) -> bytes:
        return json.dumps({"messages": [{"role": "user", "content": list(content)}, ANSWER]}).encode()

    members = [
        ("a.0.jpg", jpeg(0)), ("a.1.jpg", jpeg(1)),
        ("a.json", ask({"type": "image", "image": "1.jpg"}, {"type": "image", "image": "a.0.jpg"})),
        ("b.jpg", jpeg(2)), ("b.mp4", clip()), ("b.json", ask({"type": "video"}, {"type": "image"})),
        ("c.png", jpeg(3)), ("c.txt", "带字的图".encode()), ("c.json", b'{"width": 3, "text": "other"}'),
        ("d.jpg", jpeg(4)), ("d.json", ask({"type": "image", "image": "e.jpg"}, {"type": "image"})),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    a, b, c, d = read_all(tmp_path)
    assert isinstance(a, Record)
    assert isinstance(b, Record)
    assert isinstance(c, Record)
    assert [read_media(ref) for ref in a.media] == [jpeg(1), jpeg(0)]
    assert [read_media(ref) for ref in b.media] == [clip(), jpeg(2)]
    assert describe(c) == [("user", ["image"]), ("assistant", ["带字的图"])]
    assert (c.sample.key, c.extra) == ("c", {"width": 3})
    assert isinstance(d, Dropped)
    assert d.reason == "placeholder_without_media"


def test_a_text_that_says_image_stays_text_where_media_are_items() -> None:
    content = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "the tag <image> in HTML"}]
    draft = draft_sample({"messages": [{"role": "user", "content": content}, ANSWER]}, attached=1)
    assert draft.turns[0]["content"][1] == {"type": "text", "text": "the tag <image> in HTML"}
    draft = draft_sample({"messages": [{"role": "user", "content": "the tag <image> in HTML"}, ANSWER]})
    assert draft.turns[0]["content"] == [{"type": "text", "text": "the tag <image> in HTML"}]
    with pytest.raises(Fault, match="placeholder_without_media"):
        draft_sample({"image": "a", "conversations": [{"from": "human", "value": "<image> <image>"}]})


def test_chunks_cover_every_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "BLOCK", 100)
    path = tmp_path / "a.jsonl"
    for ending in ("", "\n"):
        lines = [json.dumps({"id": i, "messages": [{"role": "user", "content": "q" * (i * 7)}, ANSWER]}) for i in range(23)]
        path.write_text("\n".join(lines) + ending)
        for size in (1, 5, 23, 100):
            chunks = list_chunks([path], size)
            assert [chunk.count for chunk in chunks] == [min(size, 23 - first) for first in range(0, 23, size)]
            keys = [record.sample.key for chunk in chunks for record in chunk.read() if isinstance(record, Record)]
            assert keys == [str(i) for i in range(23)]
    monkeypatch.setattr(jsonl, "MAX_LINE", 120)
    kinds = [record.reason if isinstance(record, Dropped) else record.sample.key for record in read_all(path, 10)]
    assert kinds[0] == "0"
    assert kinds[-1] == "line_too_long"
    assert len(kinds) == 23


def test_files_of_one_name_give_different_keys(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, ANSWER]}))
    keys = {record.sample.key for record in read_all(tmp_path) if isinstance(record, Record)}
    assert keys == {"x/a.jsonl:1", "y/a.jsonl:1"}
    chunks = list_chunks([tmp_path / "x" / "a.jsonl", tmp_path / "y" / "a.jsonl"])
    assert [chunk.label for chunk in chunks] == ["a.jsonl", "1/a.jsonl"]


@pytest.mark.parametrize("name", ["gone", "a.tar.gz", "empty"])
def test_what_is_no_corpus_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=name):
        list_chunks([tmp_path / name])


def test_media_may_lie_under_a_further_root(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "0.jpg").write_bytes(jpeg(0))
    names = ["0.jpg", str(tmp_path / "media" / "0.jpg")]
    lines = [json.dumps({"image": name, "caption": "c"}) for name in names]
    (tmp_path / "texts" / "a.jsonl").write_text("\n".join(lines))
    assert [type(record) for record in read_all(tmp_path / "texts")] == [Dropped, Dropped]
    (chunk,) = list_chunks([tmp_path / "texts"], media_roots=[tmp_path / "media"])
    assert [type(record) for record in chunk.read()] == [Record, Record]


def test_pictures_are_measured_upright_as_the_loader_turns_them() -> None:
    turned = {form: encode(draw(60, 100), form, exif=rotated_exif()) for form in ("JPEG", "PNG", "WEBP", "TIFF")}
    plain = {form: encode(draw(60, 100), form) for form in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "AVIF", "JPEG2000", "BMP")}
    for check in ("decode", "headers"):
        for form, data in (*turned.items(), *plain.items()):
            medium = check_medium(MediaRef("image", form, Place("file", form)), data, check)
            size = (60, 100) if data is turned.get(form) else (100, 60)
            assert (medium.width, medium.height) == size, (form, check)
            assert [preview.size for preview in medium.previews] == ([size] if check == "decode" else [])


@pytest.mark.parametrize("form", ["mp4", "mkv"])
def test_frames_of_a_video_are_spread_over_it(form: str) -> None:
    data = clip(3, frames=16, form=form)
    medium = check_medium(MediaRef("video", f"a.{form}", Place("file", "a")), data, "decode")
    assert (medium.width, medium.height, medium.extension) == (128, 112, form)
    assert len(medium.previews) == 4
    wide = draw(112, 128 + 64, 3).astype(float)
    offsets = []
    for preview in medium.previews:
        pixels = np.asarray(preview, dtype=float)
        errors = [np.abs(pixels - wide[:, start : start + 128]).mean() for start in range(0, 61, 4)]
        offsets.append(int(np.argmin(errors)))
    assert offsets == [2, 6, 10, 14]


def test_a_damaged_header_in_a_tar_is_not_taken_for_its_end(tmp_path: Path) -> None:
    members = [(f"k{number}.{kind}", data) for number in range(4) for kind, data in (("jpg", jpeg(number)), ("txt", b"a text"))]
    write_tar(tmp_path / "a.tar", members)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        header = tar.getmember("k2.jpg").offset
        end = max(member.offset_data + member.size for member in tar.getmembers())
    data[header : header + 512] = b"\x5a" * 512
    (tmp_path / "a.tar").write_bytes(data)
    *good, last = read_all(tmp_path)
    assert [record.sample.key for record in good if isinstance(record, Record)] == ["k0", "k1"]
    assert isinstance(last, Dropped)
    assert (last.reason, last.detail) == ("tar_broken", f"the header at byte {header} is damaged")
    write_tar(tmp_path / "a.tar", members)
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[: -(-end // 512) * 512])
    *good, last = read_all(tmp_path)
    assert len(good) == 4
    assert isinstance(last, Dropped)
    assert last.detail == "ends without the blocks that end a tar"


def test_every_fault_is_explained_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [code for code in FAULTS if f"`{code}`" not in text] == []
