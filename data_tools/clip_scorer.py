"""Image-text relevance by a CLIP model of a Hugging Face folder: the cosine between a picture's and a text's projection.

Source: transformers 5.23.0, models/clip/modeling_clip.py; its image processor on Pillow, which needs no torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from data_tools.corpus.reader import CorpusError


class ClipScorer:
    """Cosines of pairs, from -1 to 1."""

    def __init__(self, folder: Path) -> None:
        """Load model, tokenizer and image processor.

        Raises:
            CorpusError: the folder holds no CLIP model.
        """
        try:
            self._model: Any = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._processor: Any = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise CorpusError(f"{folder}: transformers cannot load a CLIP model ({str(error).splitlines()[0]})") from None
        self._length: int = self._model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """The cosine of each pair; a text counts up to the model's length."""
        pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, max_length=self._length, return_tensors="pt")
        output = self._model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
        return (output.image_embeds * output.text_embeds).sum(-1).tolist()


def load_clip(folder: str | None) -> ClipScorer:
    """What `--clip FOLDER` scores with."""
    return ClipScorer(Path(folder or "."))
