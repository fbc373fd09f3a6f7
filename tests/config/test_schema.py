"""The configuration's schema is a golden file: a change of a key, range, default or meaning shows in review.

Regenerate it with: glmv check --schema > tests/config/schema.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from megatron_glmv.config.training import TrainConfig

GOLDEN = Path(__file__).with_name("schema.json")


def test_schema_is_the_golden_one():
    assert TrainConfig.model_json_schema() == json.loads(GOLDEN.read_text(encoding="utf-8")), (
        "the schema changed; if that is meant: glmv check --schema > tests/config/schema.json"
    )


def nodes(root: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield root
    for field in root.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from nodes(kind)


def test_every_number_has_a_range():
    """A negative step count or a weight decay of -1 must not reach a rank."""
    schemas = [root.model_json_schema() for root in nodes(TrainConfig)]
    unbounded = [
        f"{schema['title']}.{name}"
        for schema in schemas
        for name, field in schema["properties"].items()
        for choice in field.get("anyOf", [field])
        if choice.get("type") in ("integer", "number") and not {"minimum", "exclusiveMinimum"} & set(choice)
    ]
    assert unbounded == []
