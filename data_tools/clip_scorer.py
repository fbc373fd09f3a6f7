"""Image-text relevance by a CLIP model of a Hugging Face folder: the cosine between a picture's and a text's projection.

Pictures are prepared here, as CLIP's processor does, because that class needs torchvision in transformers 5.

Source: transformers 5.23.0, models/clip/modeling_clip.py and image_processing_clip.py (the shorter side to the
model's, bicubic; the middle; normalised).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from data_tools.corpus.reader import CorpusError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ClipScorer:
    """Cosines of pairs, from -1 to 1."""

    def __init__(self, folder: Path) -> None:
        """Load model and tokenizer.

        Raises:
            CorpusError: the folder holds no CLIP model.
        """
        try:
            self._model: Any = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise CorpusError(f"{folder}: transformers cannot load a CLIP model ({str(error).splitlines()[0]})") from None
        vision, text = self._model.config.vision_config, self._model.config.text_config
        self._side, self._length = vision.image_size, text.max_position_embeddings
        settings = folder / "preprocessor_config.json"
        tree = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
        self._mean = np.array(tree.get("image_mean", MEAN), dtype=np.float32)
        self._std = np.array(tree.get("image_std", STD), dtype=np.float32)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """The cosine of each pair; a text counts up to the model's length."""
        pixels = torch.from_numpy(np.stack([self.prepare(picture) for picture in pictures]))
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, max_length=self._length, return_tensors="pt")
        output = self._model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
        return (output.image_embeds * output.text_embeds).sum(-1).tolist()

    def prepare(self, picture: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[3, side, side] float32, normalised."""
        scale = self._side / min(picture.size)
        size = (max(self._side, int(picture.width * scale)), max(self._side, int(picture.height * scale)))
        resized = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - self._side) // 2, (size[1] - self._side) // 2
        cut = np.asarray(resized.crop((left, top, left + self._side, top + self._side)), dtype=np.float32)
        return ((cut / np.float32(255) - self._mean) / self._std).transpose(2, 0, 1).astype(np.float32)


def load_clip(folder: str | None) -> ClipScorer:
    """What `--clip FOLDER` scores with."""
    return ClipScorer(Path(folder or "."))
