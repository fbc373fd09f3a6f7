"""Positions of a document against transformers' `get_rope_index`: integers, so equal, not close."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_glmv.sequence.packed import pack
from megatron_glmv.sequence.positions import multimodal_positions
from tests.model import oracle

SHAPE = oracle.model_shape("digits")
RANDOM_SCRIPTS = 60


@pytest.fixture(scope="module")
def model():
    return oracle.random_model("digits")


def _ours(document):
    return torch.from_numpy(multimodal_positions(document.tokens == SHAPE.tokens.image, document.frames))


@pytest.mark.parametrize("name", oracle.SCRIPTS)
def test_equals_transformers(model, name):
    case = oracle.all_cases(SHAPE)[name]
    for document, inputs in zip(case.documents, oracle.document_inputs(case, SHAPE), strict=True):
        assert torch.equal(_ours(document), oracle.rope_positions(model, inputs)[:, 0])


def test_equals_transformers_on_random_documents(model):
    rng = np.random.default_rng(7)
    for number in range(RANDOM_SCRIPTS):
        script = []
        for _ in range(rng.integers(1, 6)):
            rows, columns = (2 * int(side) for side in rng.integers(1, 9, 2))
            media = oracle.Video(int(rng.integers(1, 5)), rows, columns) if rng.random() < 0.4 else oracle.Image(rows, columns)
            script.append(media if rng.random() < 0.7 else int(rng.integers(1, 20)))
        case = oracle.make_case(f"random-{number}", SHAPE, [script])
        (inputs,) = oracle.document_inputs(case, SHAPE)
        assert torch.equal(_ours(case.documents[0]), oracle.rope_positions(model, inputs)[:, 0]), script


def test_hand_counted_video():
    """Three frames of 3 x 4 merged tokens after six text tokens: 7 apart, 4 for the longer side and 3 for the text between."""
    frame = [True] * 12 + [False] * 3
    is_visual = np.array([False] * 6 + frame * 3)
    positions = multimodal_positions(is_visual, [(6, 8)] * 3)
    assert positions[0, is_visual].reshape(3, 12).tolist() == [[6] * 12, [13] * 12, [20] * 12]
    assert positions[1, 6:18].reshape(3, 4).tolist() == [[6] * 4, [7] * 4, [8] * 4]
    assert positions[2, 6:18].reshape(3, 4).tolist() == [[6, 7, 8, 9]] * 3


def test_packed_rows_restart_every_document(model):
    case = oracle.all_cases(SHAPE)["mixed_documents"]
    row = pack(case.documents, 256, image_token=SHAPE.tokens.image, pad_token=SHAPE.tokens.pad, align=8)
    assert sum(row.document_lengths) == 256
    for (_, start, end), inputs in zip(row.documents, oracle.document_inputs(case, SHAPE), strict=True):
        assert torch.equal(row.positions[:, start:end], oracle.rope_positions(model, inputs)[:, 0])


@pytest.mark.parametrize(
    ("is_visual", "frames", "message"),
    [
        ([False, True, True], [(2, 2)], "a run of 2 visual tokens for a frame of 1 x 1"),
        ([True, False, True], [(2, 2)], "2 runs of visual tokens but 1 frames"),
        ([False, False], [(2, 2)], "0 runs of visual tokens but 1 frames"),
    ],
)
def test_tokens_and_frames_must_match(is_visual, frames, message):
    with pytest.raises(ValueError, match=message):
        multimodal_positions(np.array(is_visual), frames)
