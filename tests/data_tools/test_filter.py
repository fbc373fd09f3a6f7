"""The rules of the filter, one table; relevance against transformers' own CLIP."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import cli
from data_tools.clip_scorer import ClipScorer
from tests.data.pictures import draw, encode
from tests.data_tools.fuzzed import jpeg, pair

GOOD_TEXT = "a drawing of some fields"
CASES = {
    "kept": (jpeg(0), GOOD_TEXT), "image_small": (jpeg(1, 50, 400), GOOD_TEXT), "image_small-2": (jpeg(1, 100, 100), GOOD_TEXT),
    "image_aspect": (jpeg(2, 60, 1300), GOOD_TEXT), "image_solid": (encode(Image.new("RGB", (200, 200), (9, 8, 7))), GOOD_TEXT),
    "kept-grey": (encode(Image.fromarray(draw(120, 140, 3)).convert("L")), GOOD_TEXT),
    "image_solid-2": (encode(np.random.default_rng(0).integers(120, 125, (150, 150, 3), dtype=np.uint8)), GOOD_TEXT),
    "text_missing": (jpeg(4), "NaN "), "text_missing-2": (jpeg(4), "  "), "text_short": (jpeg(5), "dog"),
    "kept-chinese": (jpeg(6), "一只小狗在跑"), "text_long": (jpeg(7), "many words " * 300),
    "text_repeated": (jpeg(8), "buy " * 20 + "it now"),
}  # fmt: skip


def run(folder: Path, out: Path, *more: str) -> tuple[dict[str, str], list[str]]:
    assert cli.main(["filter", str(folder), str(out), "--workers", "1", "--max-chars", "2000", *more]) == 0
    path = out / "dropped.jsonl"
    dropped = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [json.loads(line) for path in sorted(out.glob("samples*")) for line in path.read_text().splitlines()]
    return {entry["key"]: entry["reason"] for entry in dropped}, kept


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    lines = []
    for name, (data, text) in CASES.items():
        (folder / f"{name}.jpg").write_bytes(data)
        lines.append(json.dumps(pair(name, f"{name}.jpg", text)))
    (folder / "a.jsonl").write_text("\n".join(lines))
    return folder


def test_each_rule_rejects_its_own(corpus: Path, tmp_path: Path) -> None:
    dropped, kept = run(corpus, tmp_path / "out")
    assert dropped == {name: name.partition("-")[0] for name in CASES if not name.startswith("kept")}
    assert [sample["id"] for sample in kept] == [name for name in CASES if name.startswith("kept")]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dropped"] == Counter(dropped.values())
    assert report["faults"] == 0


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP with a tokenizer and processor of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("clip")
    words = ["[pad]", "[unk]", "[end]", *GOOD_TEXT.split()]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[pad]", eos_token="[end]").save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=small | {"vocab_size": 16, "max_position_embeddings": 12, "eos_token_id": 2},
                        vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=16)  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_relevance_is_the_cosine_of_transformers_and_a_threshold_cuts(corpus: Path, clip_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    _, kept = run(corpus, tmp_path / "all", "--clip", str(clip_folder), "--min-relevance", "-1")
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), AutoTokenizer.from_pretrained(clip_folder)
    scores = {}
    for sample in kept:
        picture = Image.open(tmp_path / "all" / sample["messages"][0]["content"][0]["image"]).convert("RGB")
        pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(images=picture, return_tensors="pt")
        with torch.inference_mode():
            output = model(**tokenizer([sample["messages"][1]["content"]], return_tensors="pt"), **pixels)
            scores[sample["id"]] = (output.logits_per_image[0, 0] / model.logit_scale.exp()).item()
        # Scored from a preview that is as large as these pictures; what is left is rounding to four digits and batching.
        assert sample["relevance"] == pytest.approx(scores[sample["id"]], abs=1e-4)
    assert len(set(scores.values())) == 3
    limit = sorted(scores.values())[1]
    dropped, kept = run(corpus, tmp_path / "some", "--clip", str(clip_folder), "--min-relevance", str(limit - 1e-4))
    assert [key for key, reason in dropped.items() if reason == "image_irrelevant"] == [min(scores, key=scores.__getitem__)]
    assert {sample["id"] for sample in kept} == {name for name, score in scores.items() if score >= limit - 1e-4}
    assert ClipScorer(clip_folder)([Image.new("RGB", (40, 50))], ["a " * 100])[0] <= 1.0


def first_channel(folder: str | None):
    """A scorer as users write one: how red a picture is."""
    assert folder is None
    return lambda pictures, texts: [np.asarray(picture)[..., 0].mean() / 255 for picture in pictures]


def test_a_scorer_of_ones_own_and_what_cannot_be_loaded(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, kept = run(corpus, tmp_path / "out", "--scorer", f"{__name__}:first_channel", "--min-relevance", "0")
    assert all(0 < sample["relevance"] < 1 for sample in kept)
    arguments = ["filter", str(corpus), str(tmp_path / "bad")]
    cases = [(["--scorer", "no_such:thing"], "no_such:thing"), (["--clip", str(corpus)], "cannot load a CLIP model"),
             (["--scorer", "x:y", "--check", "headers"], "needs decoded pictures")]  # fmt: skip
    for more, message in cases:
        assert cli.main([*arguments, *more]) == 1
        assert message in capsys.readouterr().err
