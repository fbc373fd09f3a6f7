"""Which tokens a context rank holds, and which a tensor rank takes on behind the last attention."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from megatron_glmv.sequence.packed import PADDING_DOCUMENT, Document, pack
from megatron_glmv.sequence.shard import context_indices, trained_indices


@pytest.mark.parametrize("context", range(2, 9))
def test_a_row_with_padding_is_cut_for_any_number_of_context_ranks(context: int) -> None:
    align = 2 * context
    documents = [Document(np.arange(1, size), np.ones(size - 1), (), f"{size}") for size in (30, 7, 101)]
    row = pack(documents, 100 * align, image_token=-1, pad_token=0, align=align)
    assert sum(row.document_lengths) == 100 * align
    assert max(row.document_lengths[3:]) <= PADDING_DOCUMENT
    shares = [context_indices(row.document_lengths, context, rank) for rank in range(context)]
    assert {len(share) for share in shares} == {200}
    assert torch.cat(shares).sort().values.equal(torch.arange(100 * align))


@pytest.mark.parametrize("num_parts", [1, 2, 4])
@pytest.mark.parametrize("multiple", [1, 8, 16])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_every_trained_token_is_taken_once_and_parts_take_equally_many(num_parts: int, multiple: int, share: float) -> None:
    drawn = random.Random(f"{num_parts} {multiple} {share}")
    trained = torch.tensor([drawn.random() < share for _ in range(128)])
    size = len(trained) // num_parts
    taken = trained_indices(trained, num_parts, multiple)
    places = taken.flatten()
    assert len(places.unique()) == len(places)
    assert set(trained.nonzero().flatten().tolist()) <= set(places.tolist())
    for part, own in enumerate(taken):
        assert own.equal(own.sort().values)
        assert bool(((own >= part * size) & (own < (part + 1) * size)).all())
    most = max(1, int(trained.view(num_parts, -1).sum(1).max()))
    assert taken.shape[1] == min(size, -(-most // multiple) * multiple)


def test_trained_tokens_of_one_part_fill_up_the_others_with_untrained_ones() -> None:
    trained = torch.tensor([False, True, False, True, True, False, False, False])
    assert trained_indices(trained, 2, 1).tolist() == [[1, 3], [4, 5]]
