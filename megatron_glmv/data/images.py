"""Pictures from compressed bytes to patches: DALI decodes, one bad picture never takes its neighbours with it.

On the CPU the decoded bytes are resized by the kernel of Hugging Face's image processor (`resize.py`), and the result is the
same to the bit. On a GPU DALI resizes as well (cubic with antialiasing in float; up to 0.27 and on average 0.0018 from Hugging
Face in normalised units).

DALI's decoders have no per-picture error option: a batch that fails is decoded again one by one, which names the culprit.

The pixels are those of `PIL.Image.open(file).convert("RGB")`, turned as the data set says: alpha is dropped, and a picture that
was packed upright is turned by its EXIF orientation. That is what transformers makes of a path or address
(`image_utils.load_image`). Of a Pillow picture it makes something else: it does not turn it and lays transparency over white.

Source: nvidia-dali 2.4.0, nvidia.dali.experimental.dynamic (labelled experimental, hence used in the media decoders only);
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
from nvidia.dali import types
from torch import Tensor

from megatron_glmv.data.media import MAX_PIXELS, BadMedia
from megatron_glmv.data.resize import resize
from megatron_glmv.sequence.patches import cut_patches

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
        size: (height, width) that the turned picture is known to have; None when unknown, then the header is read first.
        orientation: EXIF's number of the turn to apply, 1 for none.
    """

    data: bytes
    resized: tuple[int, int]
    size: tuple[int, int] | None = None
    orientation: int = 1


class PictureDecoder:
    """Decodes, resizes and cuts pictures into patches. Not for two threads at once."""

    def __init__(
        self,
        device: Literal["cpu", "gpu"] = "cpu",
        num_threads: int = 1,
        *,
        patch: int = 14,
        merge: int = 2,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """Prepare DALI.

        Args:
            device: where pictures are decoded and resized; the patches stay there. "gpu" is torch's current CUDA device.
            num_threads: threads of DALI and, on the CPU, of the resize.
            patch: side of a patch in pixels.
            merge: patches a side of one token.
            stream: on a GPU the one to work on; None makes one.
        """
        self._device = device
        self._patch, self._merge = patch, merge
        self._gpu = torch.device("cuda", torch.cuda.current_device()) if device == "gpu" else None
        self._stream = (stream or torch.cuda.Stream(self._gpu)) if self._gpu else None
        self._context = ndd.EvalContext(
            num_threads=num_threads, device_id=self._gpu.index if self._gpu else None, cuda_stream=self._stream
        )
        self._pool = ThreadPoolExecutor(num_threads, "resize") if num_threads > 1 and not self._gpu else None

    def decode(self, pictures: Sequence[EncodedPicture], into: Sequence[Tensor] | None = None) -> list[Tensor | BadMedia]:
        """The patches of each picture, or why there are none.

        Args:
            pictures: of one batch.
            into: for each picture the tensor to fill; None makes new ones.

        Returns:
            for each picture [rows x columns, patch x patch x 3] uint8, as `sequence.patches.cut_patches` makes them, or why
            there are none.
        """
        outs: Sequence[Tensor | None] = into if into is not None else [None] * len(pictures)
        # Synchronous, so that an error is raised inside the `try` below and no thread of DALI's outlives the call.
        with self._context, ndd.EvalMode.sync_full:
            decoded = self._decode(pictures)
            for index, (pixels, picture) in enumerate(zip(decoded, pictures, strict=True)):
                if not isinstance(pixels, BadMedia):
                    size = _turned(tuple(pixels.shape[:2]), picture.orientation)
                    if picture.size not in (None, size):
                        decoded[index] = BadMedia(f"decodes to {_by(size)} pixels, {_by(picture.size)} were measured")
            good = [index for index, pixels in enumerate(decoded) if not isinstance(pixels, BadMedia)]
            cut = self._finish_gpu if self._gpu else self._finish_cpu
            patches = cut([decoded[i] for i in good], [pictures[i] for i in good], [outs[i] for i in good])
            for index, result in zip(good, patches, strict=True):
                decoded[index] = result
        return decoded

    def close(self) -> None:
        """End the resizing threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _decode(self, pictures: Sequence[EncodedPicture]) -> list[Any]:
        """For each picture its pixels as a DALI tensor [height, width, 3], or a BadMedia."""
        try:
            refused = self._refuse(pictures)
            kept = [picture.data for picture, bad in zip(pictures, refused, strict=True) if bad is None]
            options = {"device": "gpu", "jpeg_fancy_upsampling": True} if self._gpu else {"device": "cpu"}
            pixels = iter(_samples(ndd.decoders.image(_batch(kept), adjust_orientation=False, **options)) if kept else ())
            return [bad or next(pixels) for bad in refused]
        except RuntimeError as error:
            if len(pictures) == 1:
                return [BadMedia(_explain(error))]
        return [result for picture in pictures for result in self._decode([picture])]

    def _refuse(self, pictures: Sequence[EncodedPicture]) -> list[BadMedia | None]:
        """Which pictures are too large to be decoded, known before any memory is taken for them."""
        unknown = [picture.data for picture in pictures if picture.size is None]
        peeked = iter(_samples(ndd.peek_image_shape(_batch(unknown))) if unknown else ())
        sizes = [picture.size or np.asarray(next(peeked)).tolist()[:2] for picture in pictures]
        return [
            BadMedia(f"{_by(size)} pixels are over the limit of {MAX_PIXELS}") if size[0] * size[1] > MAX_PIXELS else None
            for size in sizes
        ]

    def _finish_cpu(
        self, decoded: Sequence[Any], pictures: Sequence[EncodedPicture], outs: Sequence[Tensor | None]
    ) -> list[Tensor]:
        apply = self._pool.map if self._pool else map
        return list(apply(self._finish_one, [pixels.torch() for pixels in decoded], pictures, outs))

    def _finish_one(self, pixels: Tensor, picture: EncodedPicture, out: Tensor | None) -> Tensor:
        return cut_patches(resize(turn(pixels, picture.orientation), picture.resized), self._patch, self._merge, out)

    def _finish_gpu(
        self, decoded: Sequence[Any], pictures: Sequence[EncodedPicture], outs: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Resized before they are turned: DALI's pixels stay DALI's until then."""
        assert self._stream is not None
        if not decoded:
            return []
        sizes = [np.array(_turned(picture.resized, picture.orientation), dtype=np.float32) for picture in pictures]
        resized = ndd.resize(ndd.as_batch(decoded), size=ndd.as_batch(sizes), interp_type=types.INTERP_CUBIC, antialias=True)
        with torch.cuda.stream(self._stream):
            upright = (
                turn(pixels.torch(), picture.orientation) for pixels, picture in zip(_samples(resized), pictures, strict=True)
            )
            patches = [cut_patches(pixels, self._patch, self._merge, out) for pixels, out in zip(upright, outs, strict=True)]
        self._stream.synchronize()
        for tensor in patches:
            # The training stream reads them later; the allocator must not hand the memory to this stream before that.
            tensor.record_stream(torch.cuda.default_stream(self._gpu))
        return patches


def _samples(batch: ndd.Batch) -> list[ndd.Tensor]:
    """The tensors of a computed batch; with them its memory is freed.

    DALI 2.4 has a batch and its tensors refer to each other, so that the pixels would wait for the garbage collector.
    """
    tensors = list(batch.tensors)
    batch._tensors = None
    return tensors


def turn(pixels: Tensor, orientation: int) -> Tensor:
    """A picture [height, width, channels] as EXIF's orientation 1 .. 8 asks for, as Pillow's `exif_transpose` turns it."""
    if orientation >= 5:
        pixels = pixels.transpose(0, 1)
    flipped = [axis for axis, turns in ((0, (3, 4, 7, 8)), (1, (2, 3, 6, 7))) if orientation in turns]
    return pixels.flip(flipped) if flipped else pixels


def _turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return size if orientation < 5 else (size[1], size[0])


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
