"""Every impossible layout is refused before a rank starts, by one line that names the key."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_glmv.config.base import ConfigError, validate
from megatron_glmv.config.training import TrainConfig


def tree(preset: str = "glm-4.1v-9b", length: int = 8192, rows: int = 1536, **parallel: Any) -> dict[str, Any]:
    return {
        "run_folder": "runs/x",
        "steps": 10,
        "global_batch_rows": rows,
        "model": {"preset": preset},
        "parallel": parallel,
        "data": {"sequence_length": length, "sources": [{"name": "a", "path": "a"}]},
    }


REFUSED = [
    # 12 ViT heads, 32 decoder heads.
    ({"tensor": 8}, "parallel.tensor", "12 ViT attention heads"),
    ({"tensor": 3}, "parallel.tensor", "32 decoder attention heads"),
    ({"pipeline": 3}, "parallel.pipeline", "40 decoder layers"),
    ({"pipeline": 4, "virtual_pipeline": 3}, "parallel.pipeline", "40 decoder layers"),
    ({"virtual_pipeline": 2}, "parallel.virtual_pipeline", "needs pipeline > 1"),
    ({"first_stage_layers": 2}, "parallel.first_stage_layers", "needs pipeline > 1"),
    ({"last_stage_layers": 2}, "parallel.last_stage_layers", "needs pipeline > 1"),
    ({"pipeline": 4, "first_stage_layers": 2}, "parallel.first_stage_layers", "possible: first_stage_layers 1, 4, 7, 10"),
    ({"pipeline": 2, "first_stage_layers": 41}, "parallel.first_stage_layers", "0 of 40 decoder layers are left"),
    ({"pipeline": 2, "first_stage_layers": 40}, "parallel.first_stage_layers", "0 of 40 decoder layers are left"),
    ({"pipeline": 2, "first_stage_layers": 10, "last_stage_layers": 20}, "parallel.first_stage_layers", "for 0 stages"),
    (
        {"pipeline": 4, "virtual_pipeline": 2, "first_stage_layers": 1},
        "parallel.first_stage_layers",
        "possible: first_stage_layers 4, 10, 16",
    ),
    (
        {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 0},
        "parallel.first_stage_layers",
        "set virtual_pipeline to 1",
    ),
    ({"pipeline": 2, "last_stage_layers": 0}, "parallel.last_stage_layers", "greater than or equal to 1"),
    ({"expert": 2}, "parallel.expert", "set it to 1"),
    ({"tensor": 0}, "parallel.tensor", "greater than or equal to 1"),
    ({"context": 4, "length": 8190}, "data.sequence_length", "use 8184"),
    ({"length": 131072}, "data.sequence_length", "65536 positions"),
    ({"pipeline": 4, "virtual_pipeline": 2, "rows": 6}, "global_batch_rows", "multiple of pipeline 4"),
]


@pytest.mark.parametrize(("changes", "key", "part"), REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_impossible_layout_is_one_line_with_the_key(changes: dict[str, Any], key: str, part: str):
    with pytest.raises(ConfigError) as caught:
        validate(TrainConfig, tree(**changes)).check()
    message = str(caught.value)
    assert message.startswith(f"{key}: "), message
    assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor": 2},
        {"tensor": 4, "pipeline": 8},
        {"pipeline": 4, "virtual_pipeline": 5},
        {"context": 4},
        {"pipeline": 3, "first_stage_layers": 0},
        {"pipeline": 3, "first_stage_layers": 8, "virtual_pipeline": 4},
    ],
)
def test_possible_layouts_pass(layout: dict[str, int]):
    validate(TrainConfig, tree(**layout)).check()


@pytest.mark.parametrize(
    ("layout", "rows", "ranks", "part"),
    [
        ({"tensor": 2, "pipeline": 2}, 8, 6, "parallel: "),  # 6 ranks are not whole replicas of 4
        ({"tensor": 2}, 8, 6, "global_batch_rows: "),  # 8 rows over 3 replicas
        ({"pipeline": 2, "virtual_pipeline": 2}, 8, 16, "global_batch_rows: "),  # one row a replica, 2 stages interleaved
    ],
)
def test_ranks_that_do_not_fit(layout: dict[str, int], rows: int, ranks: int, part: str):
    config = validate(TrainConfig, tree(rows=rows, **layout))
    config.check()
    with pytest.raises(ConfigError, match=f"^{part}"):
        config.data_parallel(ranks)


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        ({}, (40,)),
        ({"pipeline": 4}, (10, 10, 10, 10)),
        ({"pipeline": 4, "first_stage_layers": 1}, (1, 13, 13, 13)),
        ({"pipeline": 4, "first_stage_layers": 0, "last_stage_layers": 12}, (0, 14, 14, 12)),
        ({"pipeline": 4, "last_stage_layers": 7, "virtual_pipeline": 1}, (11, 11, 11, 7)),
        ({"pipeline": 2, "first_stage_layers": 12, "last_stage_layers": 28}, (12, 28)),
    ],
)
def test_layers_of_each_stage(layout: dict[str, int], layers: tuple[int, ...]):
    assert validate(TrainConfig, tree(**layout)).parallel.stage_layers(40) == layers


def test_data_parallel_size_is_what_remains_of_the_ranks():
    assert validate(TrainConfig, tree(tensor=2, pipeline=2, context=2)).data_parallel(64) == 8


def test_key_value_heads_fewer_than_tensor_ranks_must_divide():
    config = validate(TrainConfig, tree(preset="digits", length=512, tensor=4))
    config.parallel.check_model(config.model.shape)
    shape = config.model.shape
    three = shape.model_copy(update={"text": shape.text.model_copy(update={"num_heads": 12, "num_kv_heads": 3})})
    with pytest.raises(ConfigError, match=r"^parallel.tensor: 3 key/value heads and 4 tensor ranks"):
        config.parallel.check_model(three)
