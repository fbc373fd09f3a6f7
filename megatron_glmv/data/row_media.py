"""From a stored row's media to its patches: pictures in one batch, videos one by one, grey where one does not decode.

A row keeps its shape whatever happens to a file, so that ranks stay in step and a resumed run reads the same rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_glmv.config.model import VisionShape
from megatron_glmv.data.images import EncodedPicture, PictureDecoder
from megatron_glmv.data.media import BadMedia, Media
from megatron_glmv.data.shard_reader import StoredRow
from megatron_glmv.data.video_frames import EncodedVideo, VideoDecoder

GREY = 128
"""Value of every byte of the patches that stand for a picture or video that does not decode."""
CHANGED = BadMedia("the bytes are not those that were packed (crc32 differs); copy the shard again")


@dataclass(frozen=True)
class BadDocument:
    """A sample with a picture or video that does not decode.

    Attributes:
        document: its index in the row.
        key: its name.
        reason: what is wrong with which of its files.
    """

    document: int
    key: str
    reason: str


@dataclass(frozen=True)
class _Part:
    """A picture or video of a row: its document, its entry, its bytes, and where its patches stand."""

    document: int
    key: str
    media: Media
    data: bytes
    resized: tuple[int, int]
    start: int
    end: int


class MediaDecoder:
    """Decodes the pictures and videos of rows. Not for two threads at once."""

    def __init__(self, shape: VisionShape, device: Literal["cpu", "gpu"], num_threads: int) -> None:
        """Prepare the decoders of both kinds.

        Args:
            shape: the model's vision tower.
            device: where media are decoded and resized; the patches stay there.
            num_threads: of each decoder.
        """
        self._patch = shape.patch_size
        self._device = torch.device("cuda", torch.cuda.current_device()) if device == "gpu" else torch.device("cpu")
        self._stream = torch.cuda.Stream(self._device) if device == "gpu" else None
        patch, merge = shape.patch_size, shape.spatial_merge_size
        self._pictures = PictureDecoder(device, num_threads, patch=patch, merge=merge, stream=self._stream)
        self._videos = VideoDecoder(device, num_threads, patch=patch, merge=merge, stream=self._stream)
        self._pin = device == "cpu" and torch.cuda.is_available()

    def decode(self, row: StoredRow) -> tuple[Tensor, tuple[BadDocument, ...]]:
        """The row's patches, and the samples at fault.

        Args:
            row: read with its media.

        Returns:
            [M, patch x patch x 3] uint8, the flat form of `sequence.patches.join_frames`; each bad sample once.
        """
        parts = list(self._parts(row))
        size = (parts[-1].end if parts else 0, 3 * self._patch**2)
        faults: dict[int, BadDocument] = {}
        # On a GPU the memory is the decoders' stream's, so that they need not wait for the training step in flight.
        with torch.cuda.stream(self._stream):
            patches = torch.empty(size, dtype=torch.uint8, device=self._device, pin_memory=self._pin)
            for part, result in self._decode(parts, patches):
                if isinstance(result, BadMedia):
                    reason = f"{part.media.name}: {result.reason}"
                    faults.setdefault(part.document, BadDocument(part.document, part.key, reason))
                    patches[part.start : part.end] = GREY
        if self._stream is not None:
            self._stream.synchronize()
            patches.record_stream(torch.cuda.default_stream(self._device))
        return patches, tuple(faults[document] for document in sorted(faults))

    def close(self) -> None:
        """End the decoders' threads."""
        self._pictures.close()
        self._videos.close()

    def _parts(self, row: StoredRow) -> Iterator[_Part]:
        assert row.data is not None
        start = 0
        for number, (document, media, data) in enumerate(zip(row.documents, row.media, row.data, strict=True)):
            frame = 0
            for listed, content in zip(media, data, strict=True):
                rows, columns = document.frames[frame]
                frame += listed.num_frames
                end = start + rows * columns * max(1, len(listed.frame_indices))
                yield _Part(number, document.key, listed, content, (rows * self._patch, columns * self._patch), start, end)
                start = end

    def _decode(self, parts: list[_Part], patches: Tensor) -> Iterator[tuple[_Part, Tensor | BadMedia]]:
        """Fill `patches`, and say of each part whether it could be."""
        sound: list[_Part] = []
        for part in parts:
            if len(part.data) != part.media.size_bytes or zlib.crc32(part.data) != part.media.crc32:
                yield part, CHANGED
            else:
                sound.append(part)
        pictures = [part for part in sound if part.media.kind == "image"]
        encoded = [EncodedPicture(part.data, part.resized, _size(part), part.media.orientation) for part in pictures]
        places = [patches[part.start : part.end] for part in pictures]
        yield from zip(pictures, self._pictures.decode(encoded, places), strict=True)
        for part in sound:
            if part.media.kind == "video":
                video = EncodedVideo(part.data, part.resized, _size(part), part.media.frame_indices)
                yield part, self._videos.decode(video, patches[part.start : part.end])


def _size(part: _Part) -> tuple[int, int]:
    return part.media.height, part.media.width


def moving_frames(row: StoredRow) -> list[bool]:
    """Which of the row's frames are a video's, known from its head alone."""
    return [item.kind == "video" for media in row.media for item in media for _ in range(item.num_frames)]
