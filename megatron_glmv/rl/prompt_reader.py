"""From a prompt's conversation to what the model reads: tokens, and pictures and videos decoded.

Source: transformers 5.23.0, models/glm4v/processing_glm4v.py (the same tokens and pixels; tests/data holds both to it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_glmv.config.base import InputError
from megatron_glmv.config.model import ModelShape
from megatron_glmv.data.chat import Chat
from megatron_glmv.data.images import EncodedPicture, PictureDecoder
from megatron_glmv.data.media import BadMedia
from megatron_glmv.data.picture_files import PictureError, convert_picture, prepare_picture
from megatron_glmv.data.sample import Item, Sample, SampleError
from megatron_glmv.data.video_frames import EncodedVideo, VideoDecoder
from megatron_glmv.data.videos import VideoError, VideoPlan, plan_video, read_video_header
from megatron_glmv.rl.types import MediaFile, Prompt, Task
from megatron_glmv.sequence.grid import Grid, image_grid
from megatron_glmv.sequence.patches import join_frames

MAX_BYTES = 8 << 30
"""Larger files are not read."""


class BadPromptError(InputError):
    """A prompt that cannot be read: a picture that is missing or damaged, a text that holds the template's markers."""


class PromptReader:
    """Reads prompts. Not for two threads at once.

    Args:
        chat: tokenizer, template and limits.
        shape: the model's.
        device: where media are decoded.
        num_threads: of each decoder.
    """

    def __init__(self, chat: Chat, shape: ModelShape, device: Literal["cpu", "gpu"] = "cpu", num_threads: int = 1) -> None:
        patch, merge = shape.vision.patch_size, shape.vision.spatial_merge_size
        self._chat, self._patch = chat, patch
        self._pictures = PictureDecoder(device, num_threads, patch=patch, merge=merge)
        self._videos = VideoDecoder(device, num_threads, patch=patch, merge=merge)

    def read(self, task: Task, sample: Sample, *, files: bool = False) -> Prompt:
        """One prompt with its patches.

        Args:
            task: what is asked.
            sample: the conversation.
            files: also keep the encoded pictures and videos, for engines that decode them.

        Raises:
            BadPromptError: names the prompt and what is wrong.
        """
        try:
            media = [self._load(item, sample.folder) for item in sample.media()]
            document = self._chat.encode_prompt(sample, [plan for plan, _, _ in media])
        except SampleError as error:
            raise BadPromptError(str(error)) from None
        except (OSError, PictureError, VideoError, ValueError) as error:
            raise BadPromptError(f"prompt {task.key!r}: {error}") from None
        patches = self._decode(task, media)
        kept = tuple(file for _, file, _ in media) if files else ()
        return Prompt(task, document.tokens.astype("int64"), tuple(document.frames), patches, kept)

    def close(self) -> None:
        """End the decoders' threads."""
        self._pictures.close()
        self._videos.close()

    def _load(self, item: Item, folder: Path) -> tuple[Grid | VideoPlan, MediaFile, EncodedPicture | EncodedVideo]:
        path = folder / item.value
        if "://" in item.value:
            raise BadPromptError(f"{item.value}: media are read from files; download it and name its path")
        if path.stat().st_size > MAX_BYTES:
            raise BadPromptError(f"{path}: larger than {MAX_BYTES} bytes")
        data, extension = path.read_bytes(), path.suffix.removeprefix(".").lower()
        if item.kind == "video":
            header = read_video_header(data)
            plan = plan_video(header, self._chat.video)
            video = EncodedVideo(data, (plan.height, plan.width), (header.height, header.width), plan.frame_indices)
            return plan, MediaFile("video", data, extension, plan.grid.frames), video
        picture = prepare_picture(data, extension)
        grid = image_grid(picture.height, picture.width, self._chat.image.limits, self._patch)
        upright = (picture.data, picture.extension) if picture.orientation == 1 else (convert_picture(data), "png")
        resized = (grid.rows * self._patch, grid.columns * self._patch)
        encoded = EncodedPicture(picture.data, resized, (picture.height, picture.width), picture.orientation)
        return grid, MediaFile("image", *upright), encoded

    def _decode(
        self, task: Task, media: list[tuple[Grid | VideoPlan, MediaFile, EncodedPicture | EncodedVideo]]
    ) -> Tensor | None:
        """[N, patch_dim] uint8 of all frames, None without media."""
        if not media:
            return None
        pictures = iter(self._pictures.decode([encoded for _, _, encoded in media if isinstance(encoded, EncodedPicture)]))
        flat: list[Tensor] = []
        frames: list[tuple[int, int]] = []
        moving: list[bool] = []
        for plan, _, encoded in media:
            decoded = self._videos.decode(encoded) if isinstance(encoded, EncodedVideo) else next(pictures)
            if isinstance(decoded, BadMedia):
                raise BadPromptError(f"prompt {task.key!r}: {decoded.reason}")
            flat.append(decoded)
            own = plan.frames if isinstance(plan, VideoPlan) else (plan.frame,)
            frames += own
            moving += [isinstance(plan, VideoPlan)] * len(own)
        return join_frames(torch.cat(flat), torch.tensor(frames), torch.tensor(moving))
