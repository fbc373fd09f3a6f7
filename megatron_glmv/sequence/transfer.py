"""Tensors on their way to a training device that is busy.

A copy from ordinary memory makes the processor wait until everything queued on the device is done, once for every tensor of
every row: the device then idles while the next row is prepared. From page-locked memory the copy is queued like a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The same values on `device`; the processor does not wait for them.

    torch's allocator of page-locked memory gives a block out again only after the copies that read it.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
