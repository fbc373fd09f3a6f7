"""Concepts are found as words, counted, and capped by draws that depend on the key alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from data_tools import cli
from data_tools.balance import load_concepts


def write(path: Path, texts: dict[str, str]) -> Path:
    turns = {key: [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for key, text in texts.items()}
    lines = [{"id": key, "messages": messages} for key, messages in turns.items()]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def run(corpus: Path, out: Path, *more: str) -> list[str]:
    assert cli.main(["balance", str(corpus), str(out), "--workers", "1", "--chunk", "100", *more]) == 0
    return [json.loads(line)["id"] for path in sorted(out.glob("samples*")) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("match", "text", "found"),
    [
        ("word", "A Cat, and a hot dog!", ["cat", "dog", "hot dog"]),
        ("word", "concatenate the hotdog", []),
        ("substring", "concatenate the hotdog", ["cat", "dog"]),
        ("word", "白猫在睡觉", ["猫"]),
        ("word", "the 猫cafe", ["猫"]),
        ("word", "hot\n  dog", ["dog", "hot dog"]),
        ("word", "a cat's tail; cat2", ["cat"]),
    ],
)
def test_concepts_are_found_once_each(match: str, text: str, found: list[str], tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("Cat\ndog\n\nhot  dog\n猫\ncat\n", encoding="utf-8")
    concepts = load_concepts(path, match)  # type: ignore[arg-type]
    assert concepts.names == ("cat", "dog", "hot dog", "猫")
    assert [concepts.names[number] for number in concepts.find(text)] == found


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = {f"common-{number}": "a dog in a park" for number in range(1500)}
    texts |= {f"middle-{number}": "a cat in a house" for number in range(90)}
    texts |= {f"rare-{number}": "a dog and an aardvark" for number in range(5)}
    texts |= {f"nothing-{number}": "something else" for number in range(7)}
    (tmp_path / "list.txt").write_text("dog\ncat\naardvark\nunicorn\n")
    return write(tmp_path / "a.jsonl", texts)


def test_common_concepts_are_thinned_and_rare_ones_kept_whole(corpus: Path, tmp_path: Path) -> None:
    arguments = ["--concepts", str(tmp_path / "list.txt"), "--cap", "100"]
    kept = run(corpus, tmp_path / "out", *arguments)
    # 1,500 draws of probability 100 / 1,505: mean 99.7, standard deviation 9.6; five of them are four sigma each side.
    common = sum(key.startswith("common") for key in kept)
    assert 60 < common < 140
    assert sum(key.startswith("middle") for key in kept) == 90
    assert sum(key.startswith("rare") for key in kept) == 5
    assert not any(key.startswith("nothing") for key in kept)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dropped"] == {"concept_common": 1500 - common, "no_concept": 7}
    assert (report["concepts_found"], report["concepts_over_cap"]) == (3, 1)
    histogram = json.loads((tmp_path / "out" / "histogram.json").read_text())
    assert histogram == {
        "cap": 100,
        "concepts": {"dog": [1505, common + 5], "cat": [90, 90], "aardvark": [5, 5], "unicorn": [0, 0]},
    }
    with Image.open(tmp_path / "out" / "histogram.png") as picture:
        assert picture.size == (1400, 800)
    # The draw belongs to the key: a corpus in another order and with other chunks keeps the same samples.
    lines = corpus.read_text().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join(reversed(lines)))
    assert set(run(tmp_path / "b.jsonl", tmp_path / "turned", *arguments, "--chunk", "77")) == set(kept)
    assert set(run(corpus, tmp_path / "seed", *arguments, "--seed", "1")) != set(kept)
    assert len(run(corpus, tmp_path / "unmatched", *arguments, "--unmatched", "keep")) == len(kept) + 7
