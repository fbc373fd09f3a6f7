"""Self-attention with GLM's rotations, and core attention by torch's SDPA for the ``torch`` layer spec.

Shapes: S tokens of this rank, H heads of this rank, K key/value heads of this rank, d channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from megatron_glmv.model.segments import Order, Segments


class RotarySelfAttention(SelfAttention):
    """Megatron's self-attention for packed rows, with the rotation given by the layer spec.

    Megatron's own rotary path restarts positions per document and rounds angles to bf16; both are wrong here.
    """

    def __init__(self, *args: Any, rotate: Callable[[Tensor, Tensor], Tensor], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotate = rotate

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor,
        packed_seq_params: Segments,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within each segment.

        Args:
            hidden_states: [S, 1, hidden] (a tensor rank's part of it under sequence parallelism).
            rotary_pos_emb: what the layer spec's `Rotation` has prepared of the angles.
            packed_seq_params: the segments.

        Returns:
            [S, 1, hidden] and no bias.
        """
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        query, key = self.rotate(query, rotary_pos_emb), self.rotate(key, rotary_pos_emb)
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.checkpoint_core_attention and self.training:
            context = self._checkpointed_attention_forward(
                query, key, value, None, attn_mask_type=self.attn_mask_type, packed_seq_params=packed_seq_params
            )
        else:
            context = self.core_attention(
                query, key, value, None, attn_mask_type=self.attn_mask_type, packed_seq_params=packed_seq_params
            )
        return self.linear_proj(context.reshape(context.size(0), 1, -1))


class _Reorder(torch.autograd.Function):
    """Tokens in another order; the gradient is read back, where autograd's own adds it to zeros token by token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        """[tokens, ...] x in the order `there`, [tokens] int64; `back` is its inverse."""
        ctx.orders = there, back
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        there, back = ctx.orders
        return _Reorder.apply(grads[0], back, there), None, None


def _reorder(x: Tensor, order: Order) -> Tensor:
    return _Reorder.apply(x, order.there, order.back)


class SegmentAttention(nn.Module):
    """Core attention per segment by SDPA; segments of one length are one batched call.

    With context parallelism the keys and values of all ranks are gathered and each rank's queries attend to theirs.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels or 1)
        self.causal = attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Segments,
    ) -> Tensor:
        """[S, H, d], [S, K, d], [S, K, d] -> [S, H x d]."""
        segments = packed_seq_params
        if self.context_group is not None:
            gathered = gather_from_sequence_parallel_region(
                torch.cat((key, value), dim=-1), tensor_parallel_output_grad=True, group=self.context_group
            )
            key, value = gathered.chunk(2, dim=-1)
        grouping = segments.grouping
        in_order = len(grouping.groups) == 1 and segments.context == 1
        if not in_order:
            query = _reorder(query, grouping.queries)
            key, value = _reorder(key, grouping.keys), _reorder(value, grouping.keys)
        sizes = [number * length for number, length in grouping.groups]
        own_sizes = [size // segments.context for size in sizes]
        parts = zip(grouping.groups, query.split(own_sizes), key.split(sizes), value.split(sizes), strict=True)
        outputs = [
            self._attend_group(*(part.unflatten(0, (number, -1)) for part in (q, k, v)), segments=segments).flatten(0, 1)
            for (number, _), q, k, v in parts
        ]
        if in_order:
            return outputs[0].flatten(1)
        order = grouping.queries
        return _reorder(torch.cat(outputs), Order(order.back, order.there)).flatten(1)

    def _attend_group(self, query: Tensor, key: Tensor, value: Tensor, *, segments: Segments) -> Tensor:
        """All segments of one length: [segments, tokens, H, d], keys and values [segments, tokens of all ranks, K, d]."""
        if segments.context == 1 or not self.causal:
            return self._attend(query, key, value, causal=self.causal)
        chunk = key.size(1) // (2 * segments.context)
        early, late = query.split(chunk, dim=1)
        parts = []
        for part, index in ((early, segments.rank), (late, 2 * segments.context - 1 - segments.rank)):
            end = (index + 1) * chunk
            parts.append(self._attend(part, key[:, :end], value[:, :end], causal=True))
        return torch.cat(parts, dim=1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
        """[n, q, H, d], [n, k, K, d], [n, k, K, d] -> [n, q, H, d]; with causal, the last query sees the last key."""
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        repeats = query.size(1) // key.size(1)
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        num_queries, num_keys = query.size(2), key.size(2)
        mask = None
        if causal and num_queries != num_keys:
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal and mask is None, scale=self.scale
        )
        return output.transpose(1, 2)
