"""Boxes and spans: matching against scipy's, edit distance against the table of the textbook."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from megatron_glmv.rl.rewards.geometry import best_matching, iou, merge_spans, read_boxes, read_point, span_iou
from megatron_glmv.rl.rewards.verifiers.ocr import edit_distance, likeness
from megatron_glmv.rl.rewards.verifiers.video import read_spans


def test_matching_is_the_best():
    draw = np.random.default_rng(3)
    for _ in range(200):
        weights = draw.random((draw.integers(1, 9), draw.integers(1, 9)))
        weights[draw.random(weights.shape) < 0.4] = 0
        pairs = best_matching(weights.tolist())
        rows, columns = linear_sum_assignment(weights, maximize=True)
        assert len(pairs) == len(rows) == len({row for row, _ in pairs}) == len({column for _, column in pairs})
        assert sum(weights[row, column] for row, column in pairs) == pytest.approx(weights[rows, columns].sum())
    assert best_matching([]) == []


def test_a_hundred_boxes_match_in_no_time():
    draw = random.Random(1)
    weights = [[draw.random() for _ in range(100)] for _ in range(100)]
    start = time.process_time()
    best_matching(weights)
    assert time.process_time() - start < 2


def test_iou():
    assert iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0


def test_reading_places():
    assert read_boxes("[[1,2,3,4], [5.5, 6, 7, 8]]") == [(1, 2, 3, 4), (5.5, 6, 7, 8)]
    assert read_boxes("(1, 2, 3, 4)") == [(1, 2, 3, 4)]
    assert read_boxes("") == []
    assert read_boxes("[1,2,3,4] cat") is None
    assert read_boxes("[1,2,3]") is None
    assert read_point("(1, 2)") == (1, 2)
    assert read_point("[1,2,3]") is None


def test_spans():
    assert merge_spans([(5, 7), (0, 2), (1, 3)]) == [(0, 3), (5, 7)]
    assert span_iou([(0, 10)], [(5, 15)]) == pytest.approx(1 / 3)
    assert span_iou([(0, 5), (0, 5)], [(0, 5)]) == 1
    assert span_iou([(0, 1)], [(2, 3)]) == 0


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("[12.5, 20]", [(12.5, 20)]),
        ("12.5 - 20 s", [(12.5, 20)]),
        ("From 12 seconds to 20 seconds.", [(12, 20)]),
        ("00:12 to 01:20", [(12, 80)]),
        ("1:00:00-1:00:05", [(3600, 3605)]),
        ("<1, 2> and <3, 4>", [(1, 2), (3, 4)]),
        ("[[1, 2], [3, 4]]", [(1, 2), (3, 4)]),
        ("around 12", None),
        ("12 s", None),
        ("the man runs 1 - 2", None),
        ("", None),
    ],
)
def test_reading_spans(text: str, spans: list[tuple[float, float]] | None):
    assert read_spans(text) == spans


def test_edit_distance_is_that_of_the_table():
    draw = random.Random(2)
    for _ in range(300):
        a = "".join(draw.choice("abcé字") for _ in range(draw.randint(0, 12)))
        b = "".join(draw.choice("abcé字") for _ in range(draw.randint(0, 12)))
        assert edit_distance(a, b) == by_table(a, b), (a, b)


def by_table(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def test_long_texts_take_no_time():
    draw = random.Random(4)
    a, b = ("".join(draw.choice("abcdefgh ") for _ in range(20_000)) for _ in range(2))
    start = time.process_time()
    assert 0 < likeness(a, b) < 1
    assert time.process_time() - start < 3
