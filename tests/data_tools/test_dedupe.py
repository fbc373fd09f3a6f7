"""Copies are found, relatives are not; joins find exactly what comparing all with all finds."""

from __future__ import annotations

import io
import json
import tracemalloc
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageEnhance
from scipy.sparse.csgraph import connected_components

from data_tools import cli, similarity
from data_tools.similarity import hash_picture, hash_text, label_clusters, near_hashes, near_texts, normalise_text
from tests.data.pictures import draw, encode
from tests.data_tools.fuzzed import clip, jpeg

TEXT = "An old wooden boat lies on the beach near the harbour, and two gulls sit on its bow in the evening sun."
OTHER = "Three children play chess under a large tree while their grandmother reads the newspaper aloud to everyone."


def sample(key: str, text: str, **media: Any) -> str:
    content = [{"type": kind.rstrip("s"), kind.rstrip("s"): name} for kind, names in media.items() for name in names]
    turns = [{"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}, {"role": "assistant", "content": text}]
    return json.dumps({"id": key, "messages": turns})


def run(folder: Path, out: Path, *more: str) -> tuple[list[str], dict[str, tuple[str, str]]]:
    assert cli.main(["dedupe", str(folder), str(out), "--workers", "1", "--chunk", "3", *more]) == 0
    kept = [json.loads(line)["id"] for path in sorted(out.glob("samples*")) for line in path.read_text().splitlines()]
    lines = (out / "dropped.jsonl").read_text().splitlines() if (out / "dropped.jsonl").exists() else []
    dropped = {entry["key"]: (entry["reason"], entry["detail"]) for entry in map(json.loads, lines)}
    return kept, dropped


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    first = Image.fromarray(draw(200, 300, 0))
    files = {"a.jpg": jpeg(0, 200, 300), "small.jpg": encode(first.resize((150, 100)), "JPEG", quality=50),
             "bright.png": encode(ImageEnhance.Brightness(first).enhance(1.1)), "b.jpg": jpeg(1, 200, 300),
             "large.png": encode(Image.fromarray(draw(200, 300, 1)).resize((600, 400))), "c.jpg": jpeg(2, 200, 300),
             "v.mp4": clip(0), "v.mkv": clip(0, form="mkv"), "w.mp4": clip(5)}  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
    lines = [
        sample("a", TEXT, images=["a.jpg"]), sample("b", TEXT, images=["b.jpg"]),
        sample("a-again", TEXT.upper(), images=["a.jpg"]),
        sample("small", OTHER, images=["small.jpg"]), sample("bright", TEXT, images=["bright.png"]),
        sample("large", OTHER, images=["large.png"]), sample("c", TEXT, images=["c.jpg"]),
        sample("ab", TEXT, images=["a.jpg", "b.jpg"]), sample("a-large", OTHER, images=["small.jpg", "large.png"]),
        sample("ba", TEXT, images=["b.jpg", "a.jpg"]),
        sample("v", TEXT, videos=["v.mp4"]), sample("v-other-text", OTHER, videos=["v.mp4"]),
        sample("v-again", TEXT.replace("two gulls", "2 gulls"), videos=["v.mkv"]), sample("w", TEXT, videos=["w.mp4"]),
        sample("t", TEXT), sample("t-again", TEXT.replace(",", " ").replace("old ", "")), sample("t-other", OTHER),
    ]  # fmt: skip
    (folder / "a.jsonl").write_text("\n".join(lines))
    return folder


def test_pictures_texts_and_videos_are_near_by_their_own_rules(corpus: Path, tmp_path: Path) -> None:
    kept, dropped = run(corpus, tmp_path / "out")
    assert dropped == {
        "a-again": ("duplicate_exact", "of a"), "small": ("duplicate_near", "of a"), "bright": ("duplicate_near", "of a"),
        "large": ("duplicate_near", "of b"), "a-large": ("duplicate_near", "of ab"), "v-again": ("duplicate_near", "of v"),
        "t-again": ("duplicate_near", "of t"),
    }  # fmt: skip
    assert kept == ["a", "b", "c", "ab", "ba", "v", "v-other-text", "w", "t", "t-other"]
    clusters = [json.loads(line) for line in (tmp_path / "out" / "clusters.jsonl").read_text().splitlines()]
    assert clusters[0] == {"kept": "a", "dropped": ["a-again", "small", "bright"]}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["clusters"], report["largest_cluster"]) == (5, 4)


def test_options_change_what_counts_and_what_stays(corpus: Path, tmp_path: Path) -> None:
    kept, dropped = run(corpus, tmp_path / "both", "--match", "both")
    assert {key for key in dropped if key[0] in "abcls"} == {"a-again", "bright"}
    kept, dropped = run(corpus, tmp_path / "text", "--match", "text")
    assert {"b", "c", "ab", "ba", "bright", "a-again"} <= set(dropped)
    assert {"small", "v-other-text", "t-other"} <= set(kept)
    kept, dropped = run(corpus, tmp_path / "largest", "--keep", "largest")
    assert dropped["b"] == ("duplicate_near", "of large")
    kept, dropped = run(corpus, tmp_path / "exact", "--exact-only")
    assert set(dropped) == {"a-again"}


def test_what_a_benchmark_holds_goes(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "q.jpg").write_bytes((corpus / "large.png").read_bytes())
    (tmp_path / "bench" / "q.mp4").write_bytes(clip(5))
    question = "He asked why three children play chess under a large tree while their grandmother sleeps."
    lines = [sample("q1", "yes", images=["q.jpg"]), sample("q2", "no", videos=["q.mp4"]), sample("q3", question)]
    (tmp_path / "bench" / "q.jsonl").write_text("\n".join(lines))
    _, dropped = run(corpus, tmp_path / "out", "--benchmark", str(tmp_path / "bench" / "q.jsonl"), "--ngram", "8")
    images = {key for key, (reason, _) in dropped.items() if reason == "benchmark_image"}
    assert images == {"b", "large", "ab", "ba", "a-large", "w"}
    texts = {key: detail for key, (reason, detail) in dropped.items() if reason == "benchmark_text"}
    assert texts == dict.fromkeys(("small", "v-other-text", "t-other"), "three children play chess under a large tree")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["contaminated"] == 9


@pytest.mark.parametrize("distance", [0, 3, 4, 7, 8])
def test_the_join_of_pictures_finds_every_near_pair(distance: int) -> None:
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 1 << 64, 300, dtype=np.uint64)
    for index in range(100, 300):
        bits = rng.choice(64, rng.integers(0, 12), replace=False)
        hashes[index] = hashes[index % 100] ^ np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64), initial=np.uint64(0))
    expected = {(i, j) for i, j in combinations(range(300), 2) if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= distance}
    found = {(int(i), int(j)) for left, right in near_hashes(hashes, distance) for i, j in zip(left, right, strict=True)}
    assert found == expected
    assert len(expected) > 10


def test_long_joins_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = np.random.default_rng(0).integers(0, 1 << 18, 2000, dtype=np.uint64)
    whole = {pair for left, right in near_hashes(hashes, 2) for pair in zip(left.tolist(), right.tolist(), strict=True)}
    monkeypatch.setattr(similarity, "PAIRS", 100)
    pieces = list(near_hashes(hashes, 2))
    assert len(pieces) > 1000
    assert {pair for left, right in pieces for pair in zip(left.tolist(), right.tolist(), strict=True)} == whole


def scatter(count: int, bits: int, seed: int = 0) -> npt.NDArray[np.uint64]:
    """Hashes of which each differs from one of 40 centres in at most so many bits."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 1 << 64, 40, dtype=np.uint64)
    flips = [np.bitwise_or.reduce(np.uint64(1) << rng.choice(64, rng.integers(0, bits + 1), replace=False).astype(np.uint64),
                                  initial=np.uint64(0)) for _ in range(count)]  # fmt: skip
    return rng.choice(centres, count) ^ np.array(flips, np.uint64)


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("pieces", [50, 1 << 18])
def test_labels_are_those_of_all_pairs(columns: int, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where clusters are settled again and again on the way, and every bucket counts as large."""
    monkeypatch.setattr(similarity, "PAIRS", pieces)
    monkeypatch.setattr(similarity, "SMALL_BUCKET", 1)
    for seed, distance in ((0, 3), (1, 6), (2, 9)):
        hashes = np.stack([scatter(700, 7, 10 * seed + column) for column in range(columns)], axis=1)
        hashes[::3, 0] = hashes[0, 0]
        hashes[100:] = np.where(np.arange(600)[:, None] % 4 < 3, hashes[:600] ^ np.uint64(1 << seed), hashes[100:])
        near = (np.bitwise_count(hashes[:, None] ^ hashes) <= distance).all(axis=2)
        expected = connected_components(near, directed=False)[1]
        found = similarity.label_hashes(hashes, distance)
        assert len(set(zip(expected.tolist(), found.tolist(), strict=True))) == len(set(found.tolist())) == expected.max() + 1
        assert 5 < expected.max() < 690


@pytest.mark.parametrize("large", [1, 64])
def test_no_pair_is_lost_where_labels_change_on_the_way(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that change in name only, behind two of three pieces: the search begins again behind what is done."""
    monkeypatch.setattr(similarity, "PAIRS", 40)
    monkeypatch.setattr(similarity, "SMALL_BUCKET", large)
    hashes = np.unique(scatter(500, 7))
    near = np.bitwise_count(hashes[:, None] ^ hashes) <= 8
    expected = {(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(near, 1)), strict=True)}
    rng, found = np.random.default_rng(0), set()
    clusters = similarity.Clusters(len(hashes))
    for left, right in near_hashes(hashes, 8, clusters=clusters):
        found |= set(zip(left.tolist(), right.tolist(), strict=True))
        if rng.random() < 2 / 3:
            clusters.version += 1
    assert found == expected


def test_one_large_cluster_takes_neither_memory_nor_pairs_by_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hashes that are all near each other, and of rows that share a first picture, few pairs are looked at.

    20,000 make 200 million pairs; a list of them takes 3 GiB. A piece of candidates is looked at whole before what it connects
    counts, which allows one piece for each of the 68 ways in which buckets meet.
    """
    looked_at = 0
    expand = similarity._expand

    def count(*args: Any) -> Any:
        nonlocal looked_at
        for left, places in expand(*args):
            looked_at += len(left)
            yield left, places

    monkeypatch.setattr(similarity, "_expand", count)
    rng = np.random.default_rng(0)
    near = np.unique(np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (20_000, 3), dtype=np.uint64), axis=1))
    one_cover = rng.integers(0, 1 << 64, (20_000, 3), dtype=np.uint64)
    one_cover[:, 0] = one_cover[0, 0]
    one_cover[::2, 1] = one_cover[0, 1]
    for hashes, num_clusters in ((near[:, None], 1), (one_cover, 20_000)):
        looked_at = 0
        tracemalloc.start()
        labels = similarity.label_hashes(hashes, 6)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(f"{len(hashes)} hashes: {looked_at} pairs looked at, {peak >> 20} MiB")
        assert len(set(labels.tolist())) == num_clusters
        assert looked_at < 68 * similarity.PAIRS + 100 * len(hashes)
        assert peak < 48 << 20


def test_equal_signatures_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "PAIRS", 16 * 7)
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 1 << 32, (40, 64), dtype=np.uint32)[rng.integers(0, 40, 200)]
    firsts, which = similarity.find_equal(signatures)
    assert (signatures[firsts][which] == signatures).all()
    assert len(firsts) == len(np.unique(signatures, axis=0))
    assert firsts.tolist() == sorted({which.tolist().index(number) for number in range(len(firsts))})
    assert [len(found) for found in similarity.find_equal(signatures[:0])] == [0, 0]


def test_near_texts_are_found_and_large_buckets_stay_cheap() -> None:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 6)) for _ in range(500)]
    texts = [" ".join(rng.choice(words, 40)) for _ in range(60)]
    near = [" ".join(text.split()[:-1]) for text in texts]
    signatures = np.stack([hash_text(text) for text in (*texts, *near)])
    labels = label_clusters(120, near_texts(signatures, 0.8))
    assert (labels[:60] == labels[60:]).all()
    assert len(set(labels.tolist())) == 60
    same = np.repeat(signatures[:1], 5000, axis=0)
    same[:, 0] = np.arange(5000)
    pairs = [len(left) for left, _ in near_texts(same, 0.8)]
    assert sum(pairs) < 16 * 2 * 5000
    assert len(set(label_clusters(5000, near_texts(same, 0.8)).tolist())) == 1


def test_hashes_are_stable_under_copies_and_far_for_others() -> None:
    hashes = []
    for seed in range(30):
        picture = Image.fromarray(draw(200, 300, seed))
        own = hash_picture(picture)
        hashes.append(own)
        copy = Image.open(io.BytesIO(encode(picture.resize((120, 80)), "JPEG", quality=60)))
        assert (own ^ hash_picture(copy)).bit_count() <= 6
    assert min((a ^ b).bit_count() for a, b in combinations(hashes, 2)) >= 14
    assert normalise_text(" Ｆｕｌｌ—Width, TEXT!\n") == "full width text"
    assert (hash_text("ab") == hash_text("ab")).all()
