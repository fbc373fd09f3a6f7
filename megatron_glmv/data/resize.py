"""The resize that pictures and videos share on the CPU.

torch's 8-bit bicubic kernel is the one that torchvision calls for Hugging Face's processors: the result is the same to the bit,
and costs a fifth of DALI's CPU resize.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture in another size.

    Args:
        pixels: [height, width, 3] uint8 on the CPU.
        size: (height, width) to give it.

    Returns:
        [*size, 3] uint8; `pixels` itself where it has that size.
    """
    if tuple(pixels.shape[:2]) == size:
        return pixels
    channels_first = pixels.permute(2, 0, 1)[None]
    resized = F.interpolate(channels_first, size, mode="bicubic", align_corners=False, antialias=True)
    return resized[0].permute(1, 2, 0)
