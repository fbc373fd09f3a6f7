"""Settings of rewards: what is refused, and how domains are named."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron_glmv.config.base import ConfigError, validate
from megatron_glmv.config.rewards import VERIFIERS, EndpointConfig, RewardsConfig


def test_every_verifier_is_there_under_its_own_name():
    assert set(RewardsConfig().domains) == set(VERIFIERS)
    config = validate(RewardsConfig, {"domains": {"math": {"tolerance": 1e-3}, "biology": {"verifier": "vqa", "judge": False}}})
    assert config.domains["math"].tolerance == 1e-3
    assert type(config.domains["biology"]) is VERIFIERS["vqa"]
    assert set(config.domains) == {*VERIFIERS, "biology"}
    assert validate(RewardsConfig, config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("tree", "fault"),
    [
        ({"domains": {"math": {"tol": 1}}}, r"domains\.math.*tol: unknown key"),
        ({"domains": {"biology": {"tolerance": 1}}}, r"domains\.biology: needs `verifier:`, one of math, "),
        ({"domains": {"x": {"verifier": "magic"}}}, r"domains\.x: needs `verifier:`"),
        ({"domains": {"math": {"hacks": ["nonsense"]}}}, "hacks"),
        ({"domains": {"math": {"hack_reward": 0.5}}}, "hack_reward: Input should be less than or equal to 0"),
        ({"domains": ["math"]}, "domains"),
        ({"gates": {"format": {"think": "maybe"}}}, "gates.format.think"),
        ({"judge": {"endpoints": []}}, "judge.endpoints"),
        ({"judge": {"endpoints": [{"url": "ftp://x"}]}}, "not an http"),
        ({"judge": {"endpoints": [{"url": "http://me:pw@x/v1"}]}}, "holds a user name or password"),
        ({"judge": {"endpoints": [{"token_env": "sk-1234"}]}}, "token_env"),
        ({"reward_model": {"low": 1, "high": 1}}, "high: must be above low"),
        ({"max_masked_share": 2}, "max_masked_share"),
        ({"rewards": {}}, "rewards: unknown key"),
    ],
)
def test_what_is_refused(tree: dict[str, Any], fault: str):
    with pytest.raises(ConfigError) as refused:
        validate(RewardsConfig, tree)
    assert re.search(fault, str(refused.value)), refused.value
    assert "pw" not in str(refused.value)


def test_loopback():
    assert EndpointConfig().is_loopback
    assert EndpointConfig(url="http://[::1]:8000/v1").is_loopback
    assert EndpointConfig(url="http://localhost").is_loopback
    assert not EndpointConfig(url="https://judge.example/v1").is_loopback
