"""A corpus in all three forms with one of every fault among good samples, written by the tests."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.pictures import draw, encode


@cache
def jpeg(seed: int, height: int = 120, width: int = 140) -> bytes:
    """A picture that passes every rule of the filter."""
    return encode(draw(height, width, seed), "JPEG", quality=90)


@cache
def clip(seed: int = 0, frames: int = 8, form: str = "mp4") -> bytes:
    """A video of moving fields of colour."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska" if form == "mkv" else form) as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 128, 112, "yuv420p", 2_000_000
        large = draw(112, 128 + 4 * frames, seed)
        for number in range(frames):
            picture = np.ascontiguousarray(large[:, 4 * number : 4 * number + 128])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of 50,000 x 50,000 pixels, in its header."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def pair(key: str, image: str, caption: Any = None, **extra: Any) -> dict[str, Any]:
    """A picture with a caption."""
    return {"id": key, "image": image, "caption": f"a fine drawing called {key}" if caption is None else caption, **extra}


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    """A tar of members in this order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


GOOD = 15
"""Samples of the fuzzed corpus that can be used."""
FAULTS = {
    "image_broken": 3, "media_empty": 2, "media_wrong_type": 2, "image_bomb": 2, "text_not_a_string": 1, "tar_broken": 2,
    "key_duplicate": 3, "name_outside": 4, "media_missing": 1, "json_invalid": 2, "sample_invalid": 2, "media_remote": 1,
    "text_not_unicode": 1, "media_data_uri": 1, "video_broken": 1, "member_duplicate": 1, "member_not_a_file": 1,
    "parquet_broken": 1, "media_without_placeholder": 1, "placeholder_without_media": 1,
}  # fmt: skip
MISNAMED = 1


def write_fuzzed(folder: Path) -> Path:
    """Write the corpus to folder/corpus, with a file beside it that no sample may reach."""
    root = folder / "corpus"
    (root / "i").mkdir(parents=True)
    (folder / "secret.jpg").write_bytes(jpeg(99))
    (root / "i" / "link.jpg").symlink_to(folder / "secret.jpg")
    for seed in range(6):
        (root / "i" / f"{seed}.jpg").write_bytes(jpeg(seed))
    files = {"cut.jpg": jpeg(7)[: len(jpeg(7)) // 2], "empty.mp4": b"", "page.jpg": b"<html>404</html>", "bomb.png": bomb(),
             "really.png": jpeg(8), "clip.mp4": clip(0), "cut.mp4": clip(1)[:200], "film.jpg": clip(2),
             "head.jpg": jpeg(9)[:20], "other.jpg": jpeg(10)}  # fmt: skip
    for name, data in files.items():
        (root / "i" / name).write_bytes(data)
    ask = [{"type": "video", "video": "i/clip.mp4"}, {"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": "fields of colour that move"}
    two = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a drawing"}]
    none = [{"from": "human", "value": "<image><image>\nWhat?"}, {"from": "gpt", "value": "a drawing"}]
    lines = [
        *(pair(f"good-{seed}", f"i/{seed}.jpg", score=float("nan")) for seed in range(6)),
        pair("misnamed", "i/really.png"),
        pair("../../evil", "i/../i/other.jpg"),
        {"id": "video", "messages": [{"role": "user", "content": ask}, answer]},
        pair("cut", "i/cut.jpg"),
        {"id": "empty", "video": "i/empty.mp4", "caption": "nothing at all"},
        pair("head", "i/head.jpg"),
        pair("page", "i/page.jpg"),
        pair("film", "i/film.jpg"),
        pair("bomb", "i/bomb.png"),
        pair("nan", "i/0.jpg", float("nan")),
        pair("good-0", "i/1.jpg"),
        pair("up", "../secret.jpg"),
        pair("root", "/etc/passwd"),
        pair("link", "i/link.jpg"),
        pair("gone", "i/gone.jpg"),
        pair("remote", "http://example.com/a.jpg"),
        pair("lone", "i/0.jpg", "\ud800 lone"),
        pair("uri", "data:image/png;base64,!!!"),
        {"id": "cut-video", "video": "i/cut.mp4", "caption": "a clip that ends early"},
        {"id": "no-turns", "messages": []},
        {"id": "two", "image": ["i/0.jpg", "i/1.jpg"], "conversations": two},
        {"id": "none", "image": "i/0.jpg", "conversations": none},
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n{half a line\n[1, 2]\n\n"
    (root / "a.jsonl").write_text(text, encoding="utf-8")
    members = []
    for seed in range(20, 23):
        members += [(f"t{seed}.jpg", jpeg(seed)), (f"t{seed}.txt", f"a drawing in a tar, number {seed}".encode())]
    members += [("../../escape.jpg", jpeg(23)), ("../../escape.txt", b"outside of everything")]
    members += [("twice.jpg", jpeg(24)), ("twice.jpg", jpeg(24)), ("twice.txt", b"a drawing that is there twice")]
    members += [
        ("tbomb.png", bomb()),
        ("tbomb.txt", b"a bomb in a tar"),
        ("t20.jpg", jpeg(25)),
        ("t20.txt", b"an old key again"),
    ]
    write_tar(root / "b.tar", members)
    with tarfile.open(root / "b.tar", "a") as tar:
        link = tarfile.TarInfo("linked.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    write_tar(root / "c.tar", [("u1.jpg", jpeg(30)), ("u1.txt", b"a drawing before the damage"), ("u2.jpg", jpeg(31))])
    whole = (root / "c.tar").read_bytes()
    (root / "c.tar").write_bytes(whole[: len(jpeg(30)) + 512 * 6])
    (root / "d.tar").write_bytes(b"no tar at all" * 100)
    table = [
        ("p0", jpeg(40), "a drawing in a table"),
        ("p1", jpeg(41)[: len(jpeg(41)) // 2], "a drawing that is cut"),
        ("p2", b"", "a drawing of no bytes"),
        ("p3", jpeg(42), None),
        ("p4", jpeg(43), "another drawing in a table"),
        ("good-1", jpeg(44), "a key of another file"),
    ]
    rows = [{"id": key, "image": {"bytes": data, "path": None}, "caption": caption} for key, data, caption in table]
    pq.write_table(pa.Table.from_pylist(rows), root / "e.parquet", row_group_size=4)
    (root / "f.parquet").write_bytes(b"PAR1" + b"\0" * 50)
    return root


def contents(folder: Path) -> dict[str, Any]:
    """Every file below a folder, by relative path; reports without their seconds."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        found[name] = path.read_bytes() if name != "report.json" else json.loads(path.read_text()) | {"seconds": 0}
    return found
