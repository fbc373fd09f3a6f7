"""What the te spec and FP8 ask of rows, held on the CPU: padding changes nothing, angles mean the same, copies are renewed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_glmv.model.position import (
    angles_of_halves,
    angles_of_pairs,
    cos_sin_of,
    rotate_halves,
    rotate_pairs,
    text_angles,
    vision_angles,
)
from megatron_glmv.model.segments import make_segments
from tests.model import oracle
from tests.model.layouts import make_rows
from tests.ranks import run_ranks


def with_padding(rank: int, folder: str) -> dict[str, Any]:
    """Worst differences that padding of the pictures makes in a row's losses and gradients, and what is renewed when."""
    from megatron_glmv.config.parallel import ParallelConfig, PrecisionConfig, RecomputeConfig
    from megatron_glmv.convert.hf_import import from_state_dict
    from megatron_glmv.model.glm4v import build_model
    from megatron_glmv.model.inputs import FrameShare, make_inputs
    from megatron_glmv.parallel import groups

    layout = ParallelConfig(distributed_optimizer=False)
    groups.initialize(layout, seed=1)
    shape = oracle.model_shape("digits")
    [model] = build_model(shape, layout, PrecisionConfig(dtype="fp32", layers="torch"), RecomputeConfig())
    from_state_dict([model], oracle.random_model("digits").state_dict(), shape)

    def run(row: Any, multiple: int) -> tuple[Tensor, Tensor, int]:
        inputs = make_inputs(row, shape, torch.device("cpu"), merged_multiple=multiple)
        model.zero_grad()
        losses = model(inputs)
        (losses * inputs.loss_weights).sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.vision_model.parameters()])
        return losses.detach(), gradient, len(inputs.vision.patches)

    found: dict[str, Any] = {"losses": 0.0, "gradients": 0.0, "patches": [], "shares": []}
    for row in make_rows(shape):
        plain = run(row, 1)
        for multiple in (16, 128):
            padded = run(row, multiple)
            found["losses"] = max(found["losses"], float((padded[0] - plain[0]).abs().max()))
            scale = max(float(plain[1].norm()), 1.0)
            found["gradients"] = max(found["gradients"], float((padded[1] - plain[1]).norm()) / scale)
            found["patches"].append((multiple, padded[2]))
            for place in range(3):
                vision = make_inputs(
                    row, shape, torch.device("cpu"), merged_multiple=multiple, share=FrameShare(place, 3)
                ).vision
                assert vision is not None
                found["shares"].append((multiple, len(vision.patches), vision.num_shared))
    # As where the decoder is in bf16 and the vision tower in FP8.
    model.vision_model.config.fp8 = "hybrid"
    model.vision_model.decoder.layers[0].mlp.linear_fc1.is_first_microbatch = False
    model.set_is_first_microbatch()
    found["renewed"] = model.vision_model.decoder.layers[0].mlp.linear_fc1.is_first_microbatch
    return found


def test_padding_of_pictures_changes_nothing(tmp_path: Any) -> None:
    """The blank frame attends to itself alone and no token takes its features: differences are those of other sums."""
    found = run_ranks(with_padding, 1, str(tmp_path))[0]
    assert found["losses"] < 1e-5
    assert found["gradients"] < 1e-5
    assert all(patches % (4 * multiple) == 0 for multiple, patches in found["patches"])
    assert all(patches % (4 * multiple) == 0 and shared % multiple == 0 for multiple, patches, shared in found["shares"])
    assert found["renewed"] is True


def transformer_engine_rotation(x: Tensor, angles: Tensor, *, interleaved: bool) -> Tensor:
    """Transformer Engine 2.11, pytorch/attention/rope.py, `_apply_rotary_pos_emb_base`, of which the fused kernel is a copy."""
    turning, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    if interleaved:
        turned = torch.stack((-turning[..., 1::2], turning[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turning.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return torch.cat((turning * angles.cos() + turned * angles.sin(), rest), dim=-1)


def test_both_specs_rotate_by_the_same_angles() -> None:
    x = torch.randn(37, 1, 4, 128)
    text = text_angles(torch.randint(0, 500, (3, 37)), 1e4, 64, (8, 12, 12))
    pairs = transformer_engine_rotation(x, angles_of_pairs(text), interleaved=True)
    assert torch.allclose(pairs, rotate_pairs(x, cos_sin_of(text)), atol=1e-6)
    vision = vision_angles(torch.randint(0, 40, (37,)), torch.randint(0, 40, (37,)), 128)
    halves = transformer_engine_rotation(x, angles_of_halves(vision), interleaved=False)
    assert torch.allclose(halves, rotate_halves(x, cos_sin_of(vision)), atol=1e-6)


@pytest.mark.parametrize("context", [1, 2])
def test_segments_are_what_transformer_engine_takes(context: int) -> None:
    """Lengths of whole rows, whatever the context ranks; one tensor, or a comparison would make the processor wait."""
    segments = make_segments([8, 4, 16], torch.device("cpu"), context, 0)
    assert segments.qkv_format == "thd"
    assert segments.cu_seqlens_q.tolist() == [0, 8, 12, 28]
    assert segments.cu_seqlens_q.dtype == torch.int32
    assert (segments.max_seqlen_q, segments.max_seqlen_kv) == (16, 16)
    others = (segments.cu_seqlens_kv, segments.cu_seqlens_q_padded, segments.cu_seqlens_kv_padded)
    assert all(other is segments.cu_seqlens_q for other in others)
    assert "grouping" not in vars(segments), "made for the torch spec alone"
    assert [length for _, length in segments.grouping.groups] == [8, 4, 16]


def test_labels_are_what_transformer_engine_takes() -> None:
    """Its cross-entropy steps from one label to the next by the last stride, which a transposition of one row leaves at K."""
    from megatron_glmv.model.text import TextModel

    taken: list[torch.Tensor] = []

    def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        taken.append(labels)
        return logits.sum(-1)

    labels = torch.tensor([[3, 1, 4, 1, 5]])
    losses = TextModel.token_losses(SimpleNamespace(cross_entropy=cross_entropy), torch.zeros(5, 1, 8), labels)
    assert losses.shape == (1, 5)
    assert taken[0].stride() == (1, 1)
    assert taken[0].flatten().tolist() == [3, 1, 4, 1, 5]


def test_a_temperature_divides_in_float32() -> None:
    """Divided in bf16, log-probabilities would be those of logits rounded twice."""
    from megatron_glmv.model.glm4v import Glm4vModel

    class Decoder:
        def __call__(self, hidden: Any, inputs: Any) -> None: ...

        def logits(self, hidden: Any) -> torch.Tensor:
            return torch.linspace(-9, 9, 64, dtype=torch.bfloat16).view(4, 1, 16)

    chunk = SimpleNamespace(pre_process=False, post_process=True, language_model=Decoder())
    found = Glm4vModel.forward(chunk, None, return_logits=True, temperature=0.7)
    assert found.dtype == torch.float32
    assert found.equal(Decoder().logits(None).float() / 0.7)
