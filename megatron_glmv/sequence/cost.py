"""What a document costs in training beyond its tokens, so that rows can be packed to cost alike.

Rows of equal length cost the same in the decoder's matrices, padding included, up to the last attention. What differs is what
only trained tokens do behind it (on the 9B a tenth more), attention, which grows with the square of each document's length, and
the vision tower, which grows with patches and with the square of each frame's. A replica waits for the slowest of its peers in
every step, so these parts should be even over rows.

Costs are in tokens: the work that the decoder's matrices do for a token that is not trained is 1. Forward and backward passes
keep the ratios, but for the patch embedding, whose input needs no gradient.

Source: the modules of transformers 5.23.0, models/glm4v/modeling_glm4v.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_glmv.config.model import ModelShape, TextShape, VisionShape


@dataclass(frozen=True)
class CostModel:
    """Costs of the parts of a document, in tokens.

    Attributes:
        trained: of a trained token behind the last attention: the last MLP and the head.
        pair: of one pair of tokens in the decoder's causal attention.
        patch: of one patch in the vision tower and the merger.
        patch_pair: of one pair of patches of a frame in the vision tower's attention.
    """

    trained: float
    pair: float
    patch: float
    patch_pair: float

    def extra(
        self, lengths: npt.ArrayLike, trained: npt.ArrayLike, patches: npt.ArrayLike, squared_patches: npt.ArrayLike
    ) -> npt.NDArray[np.float64]:
        """What documents cost beyond one for each token.

        Args:
            lengths: [n] tokens of each document.
            trained: [n] trained tokens of each.
            patches: [n] patches of all its frames.
            squared_patches: [n] sum over its frames of the square of the frame's patches.

        Returns:
            [n], in tokens.
        """
        tokens = np.asarray(lengths, dtype=np.float64)
        behind = self.trained * np.asarray(trained, np.float64)
        visual = self.patch * np.asarray(patches, np.float64) + self.patch_pair * np.asarray(squared_patches, np.float64)
        return behind + self.pair * tokens * (tokens + 1) / 2 + visual

    def row(self, length: int, tokens: int, trained: int, squared_tokens: int, patches: int, squared_patches: int) -> float:
        """What a row costs, in tokens: its length, padding included, and what it has beyond.

        Args:
            length: of the row.
            tokens: of its documents together.
            trained: those of them that are trained.
            squared_tokens: sum over its documents of the square of their tokens.
            patches: of its frames together.
            squared_patches: sum over its frames of the square of their patches.
        """
        attention = self.pair * (squared_tokens + tokens) / 2
        return length + self.trained * trained + attention + self.patch * patches + self.patch_pair * squared_patches


def cost_model(shape: ModelShape) -> CostModel:
    """The costs for a model of this shape."""
    token, trained = _token(shape.text)
    pair = 2 * shape.text.num_heads * shape.text.head_dim * shape.text.num_layers
    patch_pair = 2 * shape.vision.hidden_size * shape.vision.num_layers
    return CostModel(trained / token, pair / token, _patch(shape.vision) / token, patch_pair / token)


def deal_frames(vision: VisionShape, patches: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Deal the frames of a row to ranks that each encode their own, so that the costliest rank has little: largest first.

    Args:
        vision: the tower's numbers.
        patches: [n] patches of each frame.
        num_ranks: ranks that share the row.

    Returns:
        For each rank the indexes of its frames, rising; a rank may have none.
    """
    costs = frame_costs(vision, patches)
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for frame in sorted(range(len(costs)), key=lambda frame: (-costs[frame], frame)):
        rank = min(range(num_ranks), key=lambda rank: (loads[rank], rank))
        shares[rank].append(frame)
        loads[rank] += costs[frame]
    return [sorted(share) for share in shares]


def frame_costs(vision: VisionShape, patches: Sequence[int]) -> list[float]:
    """Multiply-adds of the vision tower for frames of so many patches each."""
    pair = 2 * vision.hidden_size * vision.num_layers
    return [_patch(vision) * count + pair * count**2 for count in patches]


def _token(text: TextShape) -> tuple[float, float]:
    """Multiply-adds of one token in the decoder's matrices up to the last attention, and of a trained one behind it."""
    width = text.hidden_size
    query, key_value = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    attention, mlp = width * (query + 2 * key_value) + query * width, 3 * width * text.ffn_hidden_size
    return attention * text.num_layers + mlp * (text.num_layers - 1), mlp + width * text.vocab_size


def _patch(vision: VisionShape) -> float:
    """Multiply-adds of one patch in the tower's matrices, and its share of a merged token."""
    width, merged = vision.hidden_size, vision.out_hidden_size
    block = 4 * width**2 + 3 * width * vision.ffn_hidden_size
    merger = merged**2 + 3 * merged * vision.merger_ffn_hidden_size
    tower = vision.patch_dim * width + block * vision.num_layers
    return tower + width * merged + merger / vision.spatial_merge_size**2
