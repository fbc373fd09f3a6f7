"""Pictures from compressed bytes to patches: DALI decodes, one bad picture never takes its neighbours with it.

On the CPU the decoded bytes are resized by torch's 8-bit bicubic kernel, the one that torchvision calls for Hugging Face's
image processor: the result is the same to the bit, and costs a fifth of DALI's CPU resize. On a GPU DALI resizes as well
(cubic with antialiasing in float; up to 0.27 and on average 0.0018 from Hugging Face in normalised units).

DALI's decoders have no per-picture error option: a batch that fails is decoded again one by one, which names the culprit. The
EXIF orientation is not applied and alpha is dropped, as `PIL.Image.convert("RGB")` and thus Hugging Face's processor do.

Source: nvidia-dali 2.4.0, nvidia.dali.experimental.dynamic (labelled experimental, hence used in this file only).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch
import torch.nn.functional as F
from nvidia.dali import types
from torch import Tensor

from megatron_glmv.sequence.patches import patchify

MAX_PIXELS = 178_956_970
"""A picture that claims more pixels is not decoded: the bound at which Pillow 13.0.0 raises DecompressionBombError."""
CODEC_FAILURES = {
    "#3": "the data are damaged",
    "#4": "not in a format that DALI reads (JPEG, PNG, WebP, BMP, TIFF, JPEG 2000, PNM), or no picture at all",
    "#17": "the data end early",
}
"""What nvImageCodec's status numbers mean for the user."""


@dataclass(frozen=True)
class EncodedPicture:
    """A picture to decode.

    Attributes:
        data: the file's bytes.
        resized: (height, width) in pixels to resize to, multiples of patch x merge.
        size: (height, width) that the bytes are known to hold; None when unknown, then the header is read first.
    """

    data: bytes
    resized: tuple[int, int]
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class BadPicture:
    """A picture that does not decode to what was announced, and why."""

    reason: str


class PictureDecoder:
    """Decodes, resizes and cuts pictures into patches. Not for two threads at once."""

    def __init__(
        self,
        device: Literal["cpu", "gpu"] = "cpu",
        num_threads: int = 1,
        *,
        patch: int = 14,
        temporal: int = 2,
        merge: int = 2,
    ) -> None:
        """Prepare DALI.

        Args:
            device: where pictures are decoded and resized; the patches stay there. "gpu" is torch's current CUDA device.
            num_threads: threads of DALI and, on the CPU, of the resize.
            patch: side of a patch in pixels.
            temporal: frames that one patch covers.
            merge: patches a side of one token.
        """
        self._device = device
        self._shape = (patch, temporal, merge)
        self._gpu = torch.device("cuda", torch.cuda.current_device()) if device == "gpu" else None
        self._stream = torch.cuda.Stream(self._gpu) if self._gpu else None
        self._context = ndd.EvalContext(
            num_threads=num_threads, device_id=self._gpu.index if self._gpu else None, cuda_stream=self._stream
        )
        self._pool = ThreadPoolExecutor(num_threads, "resize") if num_threads > 1 and not self._gpu else None

    def decode(self, pictures: Sequence[EncodedPicture]) -> list[Tensor | BadPicture]:
        """The patches of each picture, or why there are none.

        Returns:
            for each picture [rows x columns, 3 x temporal x patch x patch] uint8 in Hugging Face's order, or a BadPicture.
        """
        if not pictures:
            return []
        try:
            return self._attempt(pictures)
        except RuntimeError as error:
            if len(pictures) == 1:
                return [BadPicture(_explain(error))]
        return [result for picture in pictures for result in self.decode([picture])]

    def close(self) -> None:
        """End the resizing threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _attempt(self, pictures: Sequence[EncodedPicture]) -> list[Tensor | BadPicture]:
        # Synchronous, so that an error is raised inside the caller's `try` and no thread of DALI's outlives the call.
        with self._context, ndd.EvalMode.sync_full:
            refused = self._refuse(pictures)
            kept = [picture for picture, reason in zip(pictures, refused, strict=True) if reason is None]
            patches = iter(self._decode_gpu(kept) if self._gpu else self._decode_cpu(kept))
        return [next(patches) if reason is None else BadPicture(reason) for reason in refused]

    def _refuse(self, pictures: Sequence[EncodedPicture]) -> list[str | None]:
        """Why a picture is not decoded at all, judged by its size alone."""
        unknown = [picture.data for picture in pictures if picture.size is None]
        peeked = iter(ndd.peek_image_shape(_batch(unknown)).tensors if unknown else ())
        sizes = [picture.size or tuple(np.asarray(next(peeked))[:2].tolist()) for picture in pictures]
        return [
            f"{height} x {width} pixels are over the limit of {MAX_PIXELS} pixels" if height * width > MAX_PIXELS else None
            for height, width in sizes
        ]

    def _decode_cpu(self, pictures: Sequence[EncodedPicture]) -> list[Tensor | BadPicture]:
        if not pictures:
            return []
        decoded = ndd.decoders.image(_batch(picture.data for picture in pictures), device="cpu", adjust_orientation=False)
        pixels = [tensor.torch() for tensor in decoded.tensors]
        apply = self._pool.map if self._pool else map
        return list(apply(self._finish, pixels, pictures))

    def _finish(self, pixels: Tensor, picture: EncodedPicture) -> Tensor | BadPicture:
        wrong = _wrong_size(pixels, picture)
        if wrong:
            return wrong
        if tuple(pixels.shape[:2]) != picture.resized:
            channels_first = pixels.permute(2, 0, 1)[None]
            resized = F.interpolate(channels_first, picture.resized, mode="bicubic", align_corners=False, antialias=True)
            pixels = resized[0].permute(1, 2, 0)
        return patchify(pixels, *self._shape)

    def _decode_gpu(self, pictures: Sequence[EncodedPicture]) -> list[Tensor | BadPicture]:
        if not pictures:
            return []
        decoded = ndd.decoders.image(
            _batch(picture.data for picture in pictures), device="gpu", adjust_orientation=False, jpeg_fancy_upsampling=True
        )
        results: list[Tensor | BadPicture | None] = [
            _wrong_size(tensor, picture) for tensor, picture in zip(decoded.tensors, pictures, strict=True)
        ]
        sizes = ndd.as_batch([np.array(picture.resized, dtype=np.float32) for picture in pictures])
        resized = ndd.resize(decoded, size=sizes, interp_type=types.INTERP_CUBIC, antialias=True)
        with torch.cuda.stream(self._stream):
            patches = [patchify(tensor.torch(), *self._shape) for tensor in resized.tensors]
        assert self._stream is not None
        self._stream.synchronize()
        for tensor in patches:
            # The training stream reads them later; the allocator must not hand the memory to this stream before that.
            tensor.record_stream(torch.cuda.default_stream(self._gpu))
        return [bad or tensor for bad, tensor in zip(results, patches, strict=True)]


def _batch(data: Any) -> Any:
    return ndd.as_batch([np.frombuffer(item, dtype=np.uint8) for item in data])


def _wrong_size(pixels: Any, picture: EncodedPicture) -> BadPicture | None:
    size = tuple(pixels.shape[:2])
    if picture.size is None or size == picture.size:
        return None
    return BadPicture(f"decodes to {size[0]} x {size[1]} pixels, {picture.size[0]} x {picture.size[1]} were measured")


def _explain(error: RuntimeError) -> str:
    message = " ".join(str(error).split())
    for code, meaning in CODEC_FAILURES.items():
        if f"'{code}'" in message:
            return meaning
    return f"does not decode, the data are damaged ({message.rstrip(' :')[:200]})"
