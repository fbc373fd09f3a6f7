"""Pictures from compressed bytes to patches: DALI decodes, one bad picture never takes its neighbours with it.

On the CPU the decoded bytes are resized by torch's 8-bit bicubic kernel, the one that torchvision calls for Hugging Face's
image processor: the result is the same to the bit, and costs a fifth of DALI's CPU resize. On a GPU DALI resizes as well
(cubic with antialiasing in float; up to 0.27 and on average 0.0018 from Hugging Face in normalised units).

DALI's decoders have no per-picture error option: a batch that fails is decoded again one by one, which names the culprit.

The pixels are those of `PIL.Image.open(file).convert("RGB")`: alpha is dropped and the EXIF orientation is not applied.
Transformers has two conventions of its own: given a path it turns the picture by its EXIF orientation and drops alpha
(`image_utils.load_image`); given a Pillow picture it does not turn it and lays transparency over white.

Source: nvidia-dali 2.4.0, nvidia.dali.experimental.dynamic (labelled experimental, hence used in this file only);
transformers 5.23.0, image_utils.py and image_processing_backends.py.
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
        # Synchronous, so that an error is raised inside the `try` below and no thread of DALI's outlives the call.
        with self._context, ndd.EvalMode.sync_full:
            decoded = self._decode(pictures)
            for index, (pixels, picture) in enumerate(zip(decoded, pictures, strict=True)):
                if not isinstance(pixels, BadPicture) and picture.size not in (None, tuple(pixels.shape[:2])):
                    decoded[index] = BadPicture(f"decodes to {_by(pixels.shape)} pixels, {_by(picture.size)} were measured")
            good = [index for index, pixels in enumerate(decoded) if not isinstance(pixels, BadPicture)]
            cut = self._finish_gpu if self._gpu else self._finish_cpu
            for index, patches in zip(good, cut([decoded[i] for i in good], [pictures[i].resized for i in good]), strict=True):
                decoded[index] = patches
        return decoded

    def close(self) -> None:
        """End the resizing threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _decode(self, pictures: Sequence[EncodedPicture]) -> list[Any]:
        """For each picture its pixels as a DALI tensor [height, width, 3], or a BadPicture."""
        try:
            refused = self._refuse(pictures)
            kept = [picture.data for picture, bad in zip(pictures, refused, strict=True) if bad is None]
            options = {"device": "gpu", "jpeg_fancy_upsampling": True} if self._gpu else {"device": "cpu"}
            pixels = iter(ndd.decoders.image(_batch(kept), adjust_orientation=False, **options).tensors if kept else ())
            return [bad or next(pixels) for bad in refused]
        except RuntimeError as error:
            if len(pictures) == 1:
                return [BadPicture(_explain(error))]
        return [result for picture in pictures for result in self._decode([picture])]

    def _refuse(self, pictures: Sequence[EncodedPicture]) -> list[BadPicture | None]:
        """Which pictures are too large to be decoded, known before any memory is taken for them."""
        unknown = [picture.data for picture in pictures if picture.size is None]
        peeked = iter(ndd.peek_image_shape(_batch(unknown)).tensors if unknown else ())
        sizes = [picture.size or np.asarray(next(peeked)).tolist()[:2] for picture in pictures]
        return [
            BadPicture(f"{_by(size)} pixels are over the limit of {MAX_PIXELS}") if size[0] * size[1] > MAX_PIXELS else None
            for size in sizes
        ]

    def _finish_cpu(self, decoded: Sequence[Any], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        apply = self._pool.map if self._pool else map
        return list(apply(self._finish_one, [pixels.torch() for pixels in decoded], sizes))

    def _finish_one(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(pixels.shape[:2]) != size:
            channels_first = pixels.permute(2, 0, 1)[None]
            resized = F.interpolate(channels_first, size, mode="bicubic", align_corners=False, antialias=True)
            pixels = resized[0].permute(1, 2, 0)
        return patchify(pixels, *self._shape)

    def _finish_gpu(self, decoded: Sequence[Any], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        assert self._stream is not None
        if not decoded:
            return []
        targets = ndd.as_batch([np.array(size, dtype=np.float32) for size in sizes])
        resized = ndd.resize(ndd.as_batch(decoded), size=targets, interp_type=types.INTERP_CUBIC, antialias=True)
        with torch.cuda.stream(self._stream):
            patches = [patchify(pixels.torch(), *self._shape) for pixels in resized.tensors]
        self._stream.synchronize()
        for tensor in patches:
            # The training stream reads them later; the allocator must not hand the memory to this stream before that.
            tensor.record_stream(torch.cuda.default_stream(self._gpu))
        return patches


def _batch(data: Sequence[bytes]) -> Any:
    return ndd.as_batch([np.frombuffer(item, dtype=np.uint8) for item in data])


def _by(size: Any) -> str:
    return f"{size[0]} x {size[1]}"


def _explain(error: RuntimeError) -> str:
    message = " ".join(str(error).split())
    for code, meaning in CODEC_FAILURES.items():
        if f"'{code}'" in message:
            return meaning
    return f"does not decode, the data are damaged ({message.rstrip(' :')[:200]})"
