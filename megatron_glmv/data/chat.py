"""From a conversation to tokens and loss weights, with the tokenizer and chat template of a Hugging Face folder.

A video is written as its temporal patches, each like a picture, with the second of its first frame as text behind it.

GLM has no end-of-turn token: a turn of the assistant ends where the next role token, or end of text, stands, and generation
stops on those. So that a model learns to stop, the token after an assistant's turn is trained like the turn itself. The
template has no generation markers, so the turns are found from the role tokens; a text that contains such a marker literally is
refused, because it would be taken for structure.

Source: transformers 5.23.0, models/glm4v/processing_glm4v.py and models/glm46v/processing_glm46v.py (placeholder expansion),
image_processing_glm4v.py and video_processing_*.py (limits in `size`, class defaults), video_processing_utils.py (which file
holds a video's settings); stop tokens from the released generation_config.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

from megatron_glmv.data.sample import Message, Sample, SampleError
from megatron_glmv.data.videos import DynamicRate, FixedRate, VideoPlan, VideoSettings, write_seconds
from megatron_glmv.sequence.grid import VIDEO_LIMITS, Grid, PixelLimits
from megatron_glmv.sequence.packed import Document

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
STOPS = ("<|user|>", "<|observation|>")
"""Role tokens that end an assistant's turn; the last turn ends with END."""
END = "<|endoftext|>"
IMAGE, VIDEO = "<|image|>", "<|video|>"
FRAME = "<|begin_of_image|><|image|><|end_of_image|>"
"""A temporal patch of a video, before its placeholder is expanded."""
STRUCTURE = (*ROLE_TOKENS, END, IMAGE, VIDEO, "[gMASK]", "<sop>", "<eop>", "<|begin_of_image|>", "<|end_of_image|>",
             "<|begin_of_video|>", "<|end_of_video|>")  # fmt: skip
"""Markers that only the template may write; a text that holds one is an error."""


THINK_END = "</think>"


@dataclass(frozen=True)
class Thinking:
    """What becomes of think blocks, beyond what the folder's template does with them.

    Attributes:
        keep_earlier: keep the think blocks of turns before the last message of the user. The models never see them there, so
            they are taken out, and a turn that lost its own is context and not trained.
        ask_for_none: write a conversation whose last answer has no think block the way the model is asked not to think, where
            the template knows one (GLM-4.5V and 4.6V: "/nothink" and an empty block).
    """

    keep_earlier: bool = False
    ask_for_none: bool = True


class ProcessorError(ValueError):
    """A processor folder that cannot be used; the message names the folder or file."""


@dataclass(frozen=True)
class ImageSettings:
    """How the folder's image processor cuts a picture into patches."""

    limits: PixelLimits
    patch_size: int = 14
    merge_size: int = 2


def read_image_settings(folder: Path) -> ImageSettings:
    """The limits and sizes of a folder's image processor.

    Args:
        folder: with preprocessor_config.json (the released layout) or processor_config.json (what transformers 5 saves).

    Raises:
        ProcessorError: neither file is there, or it has no `size` with shortest_edge and longest_edge.
    """
    path = folder / "preprocessor_config.json"
    tree = _read_json(path)
    if tree is None:
        path = folder / "processor_config.json"
        tree = (_read_json(path) or {}).get("image_processor")
    if tree is None:
        raise ProcessorError(f"{folder}: no preprocessor_config.json; name the model's folder or one of `train-tokenizer`")
    size = tree.get("size") or {}
    if not {"shortest_edge", "longest_edge"} <= set(size):
        raise ProcessorError(f"{path}: no size with shortest_edge and longest_edge, the limits in pixels x 2 frames")
    limits = PixelLimits(int(size["shortest_edge"]), int(size["longest_edge"]))
    return ImageSettings(limits, int(tree.get("patch_size", 14)), int(tree.get("merge_size", 2)))


def read_video_settings(folder: Path) -> VideoSettings:
    """How a folder's processor samples, resizes and writes videos, found from its classes as transformers finds it.

    Args:
        folder: as for `read_image_settings`, whose limits hold for videos where the folder has no settings for them.

    Raises:
        ProcessorError: a class that is not of GLM-4.1V or GLM-4.6V, or limits that are no pair of numbers.
    """
    whole = _read_json(folder / "processor_config.json") or {}
    image = _read_json(folder / "preprocessor_config.json")
    tree = whole.get("video_processor") or _read_json(folder / "video_preprocessor_config.json") or image or {}
    named = whole.get("processor_class") or (image or {}).get("processor_class") or tree.get("processor_class")
    processor = named or "Glm4vProcessor"
    sampler = tree.get("video_processor_type") or processor.replace("Processor", "VideoProcessor")
    families = {"Glm4v": "whole", "Glm46V": "tenths"}
    names = [name.removesuffix("VideoProcessor").removesuffix("Processor") for name in (processor, sampler)]
    if not set(names) <= set(families):
        raise ProcessorError(f"{folder}: the processor's classes are {processor} and {sampler}, not of GLM-4.1V or GLM-4.6V")
    released = {"shortest_edge": VIDEO_LIMITS.min_pixels, "longest_edge": VIDEO_LIMITS.max_pixels}
    size = released | (tree.get("size") or {})
    fixed = FixedRate(float(tree.get("fps") or 2), float(tree.get("max_duration") or 300))
    try:
        limits = PixelLimits(int(size["shortest_edge"]), int(size["longest_edge"]))
    except (TypeError, ValueError):
        raise ProcessorError(f"{folder}: the video processor's size is {size}, not two numbers of pixels x frames") from None
    return VideoSettings(
        limits,
        fixed if names[1] == "Glm4v" else DynamicRate(),
        "whole" if names[0] == "Glm4v" else "tenths",
        int(tree.get("patch_size", 14)),
        int(tree.get("merge_size", 2)),
    )


class Chat:
    """The tokenizer, template, image and video settings of one processor folder.

    Attributes:
        tokenizer: of transformers.
        image: how pictures are cut into patches.
        video: which frames of a video are taken, and how they are cut.
        vocab_size: every id is below it.
        image_token: id of a merged visual token.
        pad_token: id of end of text, which also fills rows.
    """

    def __init__(self, folder: Path, thinking: Thinking | None = None) -> None:
        """Load a folder.

        Args:
            folder: in Hugging Face's layout.
            thinking: what becomes of think blocks; None is the default.

        Raises:
            ProcessorError: a missing file or template, or a tokenizer without GLM's special tokens.
        """
        self.folder = folder
        if not folder.is_dir():
            raise ProcessorError(f"{folder}: no such folder; name the model's folder or one of `train-tokenizer`")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ProcessorError(f"{folder}: transformers cannot load a tokenizer ({str(error).splitlines()[0]})") from None
        if not self.tokenizer.chat_template:
            raise ProcessorError(f"{folder}: the tokenizer has no chat template (chat_template.jinja)")
        vocabulary = self.tokenizer.get_vocab()
        missing = [marker for marker in (*ROLE_TOKENS, END, IMAGE, VIDEO) if marker not in vocabulary]
        if missing:
            raise ProcessorError(f"{folder}: the tokenizer lacks GLM's special tokens {', '.join(missing)}")
        self.image = read_image_settings(folder)
        self.video = read_video_settings(folder)
        self.vocab_size = max(vocabulary.values()) + 1
        self.image_token: int = vocabulary[IMAGE]
        self.pad_token: int = vocabulary[END]
        self._assistant: int = vocabulary["<|assistant|>"]
        self._is_role = np.zeros(self.vocab_size, dtype=np.bool_)
        self._is_role[[vocabulary[marker] for marker in ROLE_TOKENS]] = True
        self._stops = {vocabulary[marker] for marker in STOPS}
        if self.tokenizer.is_fast:
            self.tokenizer.backend_tokenizer.no_truncation()
            self.tokenizer.backend_tokenizer.no_padding()
        self._structure = re.compile("|".join(map(re.escape, STRUCTURE)))
        self._thinking = thinking or Thinking()
        self._read_template()

    def render(self, sample: Sample, *, generation_prompt: bool = False) -> str:
        """The conversation as the template writes it, media as one placeholder each.

        Args:
            sample: to render.
            generation_prompt: end with the opening of an assistant's turn.

        Raises:
            SampleError: a text holds a marker of the template.
        """
        messages = []
        last_user = _last_user(sample)
        for place, message in enumerate(sample.messages):
            for item in message.content:
                found = self._structure.search(item.value) if item.kind == "text" else None
                if found:
                    raise SampleError(sample.key, "a text holds a marker of the chat template", found.group())
            content: Any = [{"type": item.kind, item.kind: item.value} for item in message.content]
            if all(item.kind == "text" for item in message.content):
                content = _text(message)
                if message.role == "assistant" and place < last_user and not self._thinking.keep_earlier:
                    content = content.rpartition(THINK_END)[2].lstrip("\n") if THINK_END in content else content
            messages.append({"role": message.role, "content": content})
        return self._apply(messages, generation_prompt, self._asks_for_none(sample))

    def _apply(self, messages: list[dict[str, Any]], generation_prompt: bool, no_thinking: bool) -> str:
        switch = {"enable_thinking": False} if no_thinking else {}
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt, **switch)

    def _read_template(self) -> None:
        """Find out what the template does: with thinking, and what it writes in front of an answer that is generated."""
        question = {"role": "user", "content": "a"}
        answer = {"role": "assistant", "content": f"<think>\nb\n{THINK_END}\nc"}
        self._drops_earlier = f"b\n{THINK_END}" not in self._apply([question, answer, question], False, False)
        opened = [self._apply([question], True, no_thinking) for no_thinking in (False, True)]
        self._can_ask_for_none = opened[0] != opened[1]
        self._openings = self._tokenize([text.rpartition("<|assistant|>")[2] for text in opened])

    def _asks_for_none(self, sample: Sample) -> bool:
        """Whether the last answer has no think block, or an empty one, and the template can say so."""
        if not (self._thinking.ask_for_none and self._can_ask_for_none):
            return False
        answers = [message for message in sample.messages[_last_user(sample) + 1 :] if message.role == "assistant"]
        if not answers:
            return False
        last = "".join(map(_text, answers))
        before, found, _ = last.partition(THINK_END)
        return not found or not before.rpartition("<think>")[2].strip()

    def _trained_turns(self, sample: Sample) -> list[bool]:
        """Which turns of the assistant are trained: all but those that lost their think block."""
        last_user = _last_user(sample)
        loses = not self._thinking.keep_earlier or self._drops_earlier
        turns = [(place, message) for place, message in enumerate(sample.messages) if message.role == "assistant"]
        return [not (loses and place < last_user and THINK_END in _text(message)) for place, message in turns]

    def encode(self, sample: Sample, media: Sequence[Grid | VideoPlan]) -> Document:
        """A sample as one document.

        Every token of an assistant's turn is trained with weight 1, and so is the token that ends it. The role token and what
        the template writes behind it to have a turn generated (a newline; an empty think block where thinking is switched off)
        are the prompt and are not; that block is not trained either where the template writes it in front of an answer without
        thoughts. Nor is a turn that lost its think block (`Thinking`).

        Args:
            sample: a conversation.
            media: the grid of each image and the plan of each video, in the order of the text.

        Returns:
            A document with visual placeholders expanded to one token a merged patch, and videos to their temporal patches with
            the seconds between them; tokens int32, loss weights float32.

        Raises:
            SampleError: markers of the template in a text, or media that do not match the sample's.
        """
        (document,) = self.encode_all([(sample, media)])
        if isinstance(document, SampleError):
            raise document
        return document

    def encode_all(self, samples: Sequence[tuple[Sample, Sequence[Grid | VideoPlan]]]) -> list[Document | SampleError]:
        """Samples as documents, in half the time that one by one takes.

        Args:
            samples: with the grid of each image and the plan of each video, as `encode` takes them.

        Returns:
            For each sample its document, or what `encode` would raise.
        """
        written: list[str | SampleError] = []
        for sample, media in samples:
            try:
                written.append(self._write_videos(sample, media))
            except SampleError as error:
                written.append(error)
        tokenized = iter(self._tokenize([text for text in written if isinstance(text, str)]))
        results: list[Document | SampleError] = []
        for (sample, media), text in zip(samples, written, strict=True):
            try:
                results.append(text if isinstance(text, SampleError) else self._lay_out(sample, next(tokenized), media))
            except SampleError as error:
                results.append(error)
        return results

    def encode_prompt(self, sample: Sample, media: Sequence[Grid | VideoPlan]) -> Document:
        """A conversation up to where the assistant's next turn begins; nothing of it is trained.

        Args:
            sample: a conversation that the assistant does not end.
            media: as `encode` takes them.

        Returns:
            A document as `encode` makes it, with weights 0.

        Raises:
            SampleError: as `encode`.
        """
        (ids,) = self._tokenize([self._write_videos(sample, media, generation_prompt=True)])
        tokens = np.array(ids, dtype=np.int32)
        repeats, frames = self._repeats(tokens, sample, media)
        expanded = np.repeat(tokens, repeats)
        return Document(expanded, np.zeros(len(expanded), dtype=np.float32), frames, sample.key)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if self.tokenizer.is_fast:
            # Without the offsets and masks that transformers asks for.
            return [found.ids for found in self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _lay_out(self, sample: Sample, ids: Sequence[int], media: Sequence[Grid | VideoPlan]) -> Document:
        """Tokens with placeholders expanded, their weights, and the frames."""
        tokens = np.array([*ids, self.pad_token], dtype=np.int32)
        repeats, frames = self._repeats(tokens, sample, media)
        weights = self._weights(tokens, sample)
        return Document(np.repeat(tokens, repeats), np.repeat(weights, repeats), frames, sample.key)

    def _repeats(
        self, tokens: npt.NDArray[np.int32], sample: Sample, media: Sequence[Grid | VideoPlan]
    ) -> tuple[npt.NDArray[np.int64], tuple[tuple[int, int], ...]]:
        """How often each token stands in the document, a placeholder once for each merged patch; and the frames."""
        frames: list[tuple[int, int]] = []
        for plan in media:
            frames += plan.frames if isinstance(plan, VideoPlan) else (plan.frame,)
        is_image = tokens == self.image_token
        if int(is_image.sum()) != len(frames):
            raise SampleError(sample.key, "the template does not show every image once",
                              f"{int(is_image.sum())} placeholders for {len(frames)} images")  # fmt: skip
        repeats = np.ones(len(tokens), dtype=np.int64)
        repeats[is_image] = [rows * columns // self.image.merge_size**2 for rows, columns in frames]
        return repeats, tuple(frames)

    def _write_videos(self, sample: Sample, media: Sequence[Grid | VideoPlan], *, generation_prompt: bool = False) -> str:
        """The rendered text with every video's placeholder replaced by its temporal patches and their seconds."""
        plans = [plan for plan in media if isinstance(plan, VideoPlan)]
        first, *rest = self.render(sample, generation_prompt=generation_prompt).split(VIDEO)
        if len(rest) != len(plans):
            raise SampleError(sample.key, "the template does not show every video once",
                              f"{len(rest)} placeholders for {len(plans)} videos")  # fmt: skip
        for plan, following in zip(plans, rest, strict=True):
            first += "".join(FRAME + write_seconds(time, self.video.seconds) for time in plan.seconds) + following
        return first

    def _weights(self, tokens: npt.NDArray[np.int32], sample: Sample) -> npt.NDArray[np.float32]:
        """1 on the assistant's turns, behind what generation is given, and on the tokens that end them; END is the last."""
        weights = np.zeros(len(tokens), dtype=np.float32)
        edges = [*np.flatnonzero(self._is_role[tokens]).tolist(), len(tokens) - 1]
        trained = iter(self._trained_turns(sample))
        with_thinking, without = self._openings
        asks_for_none = self._asks_for_none(sample)
        for start, end in pairwise(edges):
            if tokens[start] == self._assistant and next(trained, True):
                is_empty = self._thinking.ask_for_none and tokens[start + 1 :][: len(without)].tolist() == without
                opening = without if asks_for_none or is_empty else with_thinking
                weights[start + 1 + len(opening) : end] = 1.0
                if end == edges[-1] or int(tokens[end]) in self._stops:
                    weights[end] = 1.0
        return weights


def _text(message: Message) -> str:
    return "".join(item.value for item in message.content if item.kind == "text")


def _last_user(sample: Sample) -> int:
    """Index of the user's last message, -1 without one."""
    return max((place for place, message in enumerate(sample.messages) if message.role == "user"), default=-1)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ProcessorError(f"{path}: not JSON ({error})") from None
