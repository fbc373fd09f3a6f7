"""Entropy over a divided vocabulary: value and gradient are those of the whole distribution in float64."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_ranks

LOGITS = torch.randn(5, 1, 12, generator=torch.Generator().manual_seed(0)) * 3
SLOPES = torch.linspace(-1, 1, 5)[:, None]


def parts(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entropy, gradient of this rank's share, the logits afterwards, and the entropy that is only reported, in blocks of 2."""
    import torch.distributed as dist

    from megatron_glmv.model import entropy as room
    from megatron_glmv.model.entropy import vocab_parallel_entropy

    room.BLOCK = 2
    dist.init_process_group("gloo")
    own = LOGITS.chunk(dist.get_world_size(), dim=-1)[rank].clone().requires_grad_()
    reported = vocab_parallel_entropy(own, dist.group.WORLD, learn=False)
    assert not reported.requires_grad
    entropy = vocab_parallel_entropy(own, dist.group.WORLD, learn=True)
    (entropy * SLOPES).sum().backward()
    return entropy.detach(), own.grad, own.detach(), reported


@pytest.fixture(scope="module")
def found() -> list[tuple[torch.Tensor, ...]]:
    return run_ranks(parts, 2)


def test_entropy_and_gradient_are_those_of_the_whole(found) -> None:
    logits = LOGITS.double().requires_grad_()
    chances = logits.softmax(-1)
    entropy = -(chances * chances.log()).sum(-1)
    (entropy * SLOPES.double()).sum().backward()
    for values, _, _, reported in found:
        torch.testing.assert_close(values.double(), entropy.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(reported, values, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.cat([gradient for _, gradient, _, _ in found], dim=-1).double(), logits.grad, rtol=1e-5, atol=1e-6
    )


def test_logits_stay_as_they_are(found) -> None:
    assert torch.equal(torch.cat([logits for _, _, logits, _ in found], dim=-1), LOGITS)
