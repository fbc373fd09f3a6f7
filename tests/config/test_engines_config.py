"""The engine of a run: one of two kinds, loopback by default, no password in a file."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_glmv.config.base import Config, ConfigError, validate
from megatron_glmv.config.engines import EmbeddedConfig, EngineConfig, VllmConfig
from megatron_glmv.config.http import is_loopback

VLLM = {"kind": "vllm", "weights": {"kind": "disk", "folder": "/dev/shm/weights"}}


class Root(Config):
    """What holds an engine."""

    engine: EngineConfig = EmbeddedConfig()


def engine(**settings: Any) -> Any:
    return validate(Root, {"engine": settings}).engine


def test_kinds():
    assert validate(Root, {}).engine == EmbeddedConfig(max_answers=64, gap_alarm=0.05)
    assert engine(kind="embedded", max_answers=7, gap_alarm=None).gap_alarm is None
    assert engine(max_answers=9) == EmbeddedConfig(max_answers=9)
    made = engine(**VLLM)
    assert isinstance(made, VllmConfig) and made.gap_alarm == 0.05
    assert all(is_loopback(url) for url in made.addresses)
    assert engine(**VLLM, addresses=["http://10.0.0.7:8000/"]).addresses == ("http://10.0.0.7:8000",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sglang"}, r"engine\.kind: there are embedded and vllm"),
        ({"kind": "embedded", "addresses": ["http://127.0.0.1"]}, r"engine\.embedded\.addresses: unknown key"),
        ({"kind": "vllm"}, r"engine\.vllm\.weights: Field required"),
        (VLLM | {"addresses": []}, "at least 1 item"),
        (VLLM | {"addresses": ["127.0.0.1:8000"]}, r"not an http\(s\) address"),
        (VLLM | {"addresses": ["http://me:secret@10.0.0.7"]}, "see token_env"),
        (VLLM | {"token_env": "sesame-1234"}, "token_env"),
        (VLLM | {"concurrency": 0}, "greater than or equal to 1"),
        (VLLM | {"gap_alarm": 0}, "greater than 0"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        engine(**settings)
