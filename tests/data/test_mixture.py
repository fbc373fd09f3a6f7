"""The mixture of sources: shares, and the closed form against replaying the stream."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_glmv.data.mixture import BLOCK_POSITIONS, Mixture, block_counts


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1.0], (10_000,)),
        ([1.0, 1.0, 1.0], (3_334, 3_333, 3_333)),
        ([3.0, 1.0], (7_500, 2_500)),
        ([0.3, 0.1], (7_500, 2_500)),
        ([1e-9, 1.0, 1.0], (1, 5_000, 4_999)),
        ([1e9, 1e-9, 1e-9], (9_998, 1, 1)),
    ],
)
def test_counts_of_a_block(weights, counts):
    assert block_counts(weights) == counts
    assert sum(counts) == BLOCK_POSITIONS


def test_counts_when_every_position_is_needed():
    assert block_counts([5.0, 1e-6, 1e-6, 1e-6], block=4) == (1, 1, 1, 1)


@pytest.mark.parametrize("weights", [[], [0.0, 1.0], [-1.0, 1.0], [float("inf"), 1.0], [float("nan")]])
def test_weights_that_make_no_mixture(weights):
    with pytest.raises(ValueError):
        block_counts(weights)


def test_closed_form_equals_replay():
    """Counting rows one by one gives the k of every position, over the ends of two blocks."""
    mixture = Mixture([5.0, 1.0, 0.002], seed=7)
    seen: Counter[int] = Counter()
    for position in range(2 * BLOCK_POSITIONS + 500):
        source, drawn = mixture.locate(position)
        assert drawn == seen[source]
        seen[source] += 1


def test_shares_follow_the_weights_and_blocks_differ():
    mixture = Mixture([7.0, 2.0, 1.0], seed=3)
    first = [mixture.locate(position)[0] for position in range(BLOCK_POSITIONS)]
    second = [mixture.locate(position)[0] for position in range(BLOCK_POSITIONS, 2 * BLOCK_POSITIONS)]
    for block in (first, second):
        assert Counter(block) == {0: 7_000, 1: 2_000, 2: 1_000}
    assert first != second
    # Any 1,000 neighbours hold 700 of source 0 within six deviations of drawing without replacement (14 each).
    assert abs(first[4_000:5_000].count(0) - 700) < 85


def test_seed_and_position_alone_decide():
    forward, backward = Mixture([2.0, 1.0], seed=11), Mixture([2.0, 1.0], seed=11)
    positions = list(range(0, 60_000, 977))
    there = [forward.locate(position) for position in positions]
    back = [backward.locate(position) for position in reversed(positions)]
    assert there == back[::-1]
    assert there != [Mixture([2.0, 1.0], seed=12).locate(position) for position in positions]


def test_one_source_is_the_identity():
    assert Mixture([0.25], seed=0).locate(123_456_789) == (0, 123_456_789)
