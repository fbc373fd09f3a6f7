"""The configurations' schemas are golden files: a change of a key, range, default or meaning shows in review.

Regenerate them with: glmv check --schema > tests/config/schema.json; glmv rl --schema > tests/config/rl_schema.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from megatron_glmv.config.rl_stage import RlConfig
from megatron_glmv.config.training import TrainConfig

GOLDEN = {
    TrainConfig: ("schema.json", "glmv check --schema"),
    RlConfig: ("rl_schema.json", "glmv rl --schema"),
}


@pytest.mark.parametrize("root", GOLDEN)
def test_schema_is_the_golden_one(root: type[BaseModel]):
    name, command = GOLDEN[root]
    golden = json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    assert root.model_json_schema() == golden, f"the schema changed; if that is meant: {command} > tests/config/{name}"


def nodes(root: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield root
    for field in root.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from nodes(kind)


ANY_NUMBER = {"RewardModelConfig.low", "RewardModelConfig.high"}
"""Scores of a reward model, which has a scale of its own."""


@pytest.mark.parametrize("root", GOLDEN)
def test_every_number_has_a_range(root: type[BaseModel]):
    """A negative step count or a weight decay of -1 must not reach a rank."""
    schemas = [node.model_json_schema() for node in nodes(root)]
    unbounded = [
        f"{schema['title']}.{name}"
        for schema in schemas
        for name, field in schema["properties"].items()
        for choice in field.get("anyOf", [field])
        if choice.get("type") in ("integer", "number") and not {"minimum", "exclusiveMinimum"} & set(choice)
    ]
    assert set(unbounded) <= ANY_NUMBER
