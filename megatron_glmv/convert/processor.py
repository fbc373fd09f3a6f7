"""The processor of a Hugging Face folder: tokenizer, chat template and the limits of images and videos, found, checked, copied.

A folder whose weights are right and whose tokenizer belongs to a relative answers nonsense: GLM-4.1V and GLM-4.6V have the same
token strings under other ids. So every id that the model knows is checked before anything is written. Files are read as JSON or
by the `tokenizers` and SentencePiece parsers; nothing of the folder is executed or unpickled.

Source: transformers 5.23.0, processing_utils.py and models/auto/processing_auto.py (which file is read, and that a missing
video_preprocessor_config.json is replaced by preprocessor_config.json, the images' limits),
models/glm4v/video_processing_glm4v.py (limits of a video); released folders (the names of the files).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_glmv.config.base import InputError, read_yaml
from megatron_glmv.config.model import ModelShape
from megatron_glmv.convert.hf_config import generation_config_json
from megatron_glmv.data.fast_tokenizer import convert_sentencepiece, tokenizer_config
from megatron_glmv.run_folder.checkpoint_folder import CheckpointError, find
from megatron_glmv.sequence.grid import VIDEO_LIMITS

TOKENIZER, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
TOKENIZER_CONFIG, PROCESSOR_CONFIG = "tokenizer_config.json", "processor_config.json"
IMAGE_CONFIG, VIDEO_CONFIG = "preprocessor_config.json", "video_preprocessor_config.json"
GENERATION_CONFIG = "generation_config.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
COPIED = (
    TOKENIZER, SENTENCEPIECE, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    *TEMPLATES, IMAGE_CONFIG, VIDEO_CONFIG, PROCESSOR_CONFIG, GENERATION_CONFIG,
)  # fmt: skip
"""What is copied where it is there; never weights, code or pickles."""
MEDIA_TOKENS = {
    "<|image|>": "image",
    "<|video|>": "video",
    "<|begin_of_image|>": "image_start",
    "<|end_of_image|>": "image_end",
    "<|begin_of_video|>": "video_start",
    "<|end_of_video|>": "video_end",
}
"""Token -> its field of `SpecialTokens`."""
CLASSES = {"Glm4vProcessor": "Glm4vVideoProcessor", "Glm46VProcessor": "Glm46VVideoProcessor"}
"""Processors of the family, and their video processors."""
VIDEO_SIZE = {"shortest_edge": VIDEO_LIMITS.min_pixels, "longest_edge": VIDEO_LIMITS.max_pixels}
"""Pixels x frames of a video after resizing, as both video processors write it."""
VIDEO_SHARED = (
    "do_rescale", "rescale_factor", "do_normalize", "do_convert_rgb", "image_mean", "image_std", "resample", "patch_size",
    "temporal_patch_size", "merge_size", "processor_class",
)  # fmt: skip
"""Image settings that hold for videos too."""


class ProcessorError(InputError):
    """A processor folder that cannot be used with this model; one line that names the file and what to do."""


def find_processor(checkpoint: Path) -> Path:
    """The processor folder that belongs to a checkpoint.

    It is the checkpoint's own `processor` folder, or the first that its configuration leads to: that of its prompts, the
    Hugging Face folder or the checkpoint that the run started from, then the folder that its data was packed with.

    Args:
        checkpoint: one complete checkpoint.

    Raises:
        ProcessorError: there is none.
        ConfigError: the checkpoint's configuration is not YAML.
    """
    tried = []
    for folder in _candidates(checkpoint, set()):
        if (folder / TOKENIZER).is_file() or (folder / SENTENCEPIECE).is_file():
            return folder
        tried.append(str(folder))
    raise ProcessorError(
        f"{checkpoint}: no tokenizer in {', '.join(tried)}; pass --processor FOLDER, with tokenizer, template and image limits"
    )


def _candidates(checkpoint: Path, seen: set[Path]) -> Iterator[Path]:
    yield checkpoint / "processor"
    seen.add(checkpoint.resolve())
    path = checkpoint / "config.yaml"
    tree = read_yaml(path) if path.is_file() else {}
    if processor := _find(tree, "prompts", "processor"):
        yield Path(processor)
    if hf_folder := _find(tree, "model", "hf_folder"):
        yield Path(hf_folder)
    if start := _find(tree, "checkpoint", "start_from"):
        try:
            earlier = find(Path(start))
        except CheckpointError:
            earlier = Path(start)
        if earlier.resolve() not in seen:
            yield from _candidates(earlier, seen)
    if source := _find(tree, "data", "sources", 0, "path"):
        yield Path(source) / "processor"


def _find(tree: Any, *keys: str | int) -> Any:
    """The value under the keys and indices, or None."""
    for key in keys:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def check_processor(folder: Path, shape: ModelShape) -> None:
    """Refuse a folder that lacks something, or that belongs to another model.

    Args:
        folder: with tokenizer, chat template and image settings.
        shape: the architecture.

    Raises:
        ProcessorError: a missing file, code of its own, another family's processor, other patches, or other token ids.
    """
    check_tokenizer(folder, shape)
    settings = _tokenizer_settings(folder)
    if not any((folder / name).is_file() for name in TEMPLATES) and not settings.get("chat_template"):
        raise ProcessorError(f"{folder}: no {' or '.join(TEMPLATES)}; without it the exported model answers nothing")
    path, image = _image_settings(folder)
    for file, tree in ((folder / TOKENIZER_CONFIG, settings), (path, image)):
        if "auto_map" in tree:
            raise ProcessorError(f"{file}: asks for code of the folder (auto_map), which is never run; use a released folder")
        if (name := tree.get("processor_class")) not in (None, *CLASSES):
            raise ProcessorError(f"{file}: processor_class is {name!r}; this family's are {' and '.join(CLASSES)}")
    vision = shape.vision
    for key, wanted in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
    ):
        if image.get(key, wanted) != wanted:
            raise ProcessorError(f"{path}: {key} is {image[key]}, the model's is {wanted}; use the model's own folder")


def check_tokenizer(folder: Path, shape: ModelShape) -> None:
    """Refuse a tokenizer whose ids are not those of the model.

    Args:
        folder: with tokenizer.json and tokenizer_config.json, or tokenizer.model alone.
        shape: the architecture.

    Raises:
        ProcessorError: unreadable or missing files, a special token under another id, or an id beyond the vocabulary.
        TokenizerError: a tokenizer.model that cannot be read or has no equivalent fast tokenizer.
    """
    path, tokenizer = _load_tokenizer(folder)
    settings, tokens = _tokenizer_settings(folder), shape.tokens
    wanted = {text: getattr(tokens, name) for text, name in MEDIA_TOKENS.items()}
    wanted[_named_token(folder, settings, "pad_token")] = tokens.pad
    for text, number in wanted.items():
        if (found := tokenizer.token_to_id(text)) != number:
            raise ProcessorError(_differs(path, text, found, number))
    end = _named_token(folder, settings, "eos_token")
    if (found := tokenizer.token_to_id(end)) not in tokens.eos:
        raise ProcessorError(_differs(path, end, found, " or ".join(map(str, tokens.eos))))
    for number in tokens.eos:
        if tokenizer.id_to_token(number) is None:
            raise ProcessorError(f"{path}: has no token {number}, at which the model's answers end; use the model's tokenizer")
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        text = _text(token)
        if (found := tokenizer.token_to_id(text)) != int(number):
            raise ProcessorError(f"{folder / TOKENIZER_CONFIG}: {text} has id {number}, and {found} in {TOKENIZER}")
    text, largest = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if largest >= shape.text.vocab_size:
        raise ProcessorError(f"{path}: {text!r} has id {largest}, the model's vocabulary ends before {shape.text.vocab_size}")


def _differs(path: Path, text: str, found: int | None, wanted: int | str) -> str:
    has = f"has no token {text}" if found is None else f"{text} has id {found}"
    return f"{path}: {has}, the model was trained with {wanted}; use the tokenizer of this model"


def copy_processor(folder: Path, target: Path, shape: ModelShape) -> None:
    """Check a processor folder and copy it beside exported weights, completed where a released folder has more.

    A folder with a SentencePiece model alone gets an equivalent tokenizer.json; one without video settings gets the family's;
    one without generation_config.json gets the model's stops.

    Args:
        folder: with tokenizer, chat template and image settings.
        target: an existing folder.
        shape: the architecture.

    Raises:
        ProcessorError: as `check_processor`.
        TokenizerError: as `check_tokenizer`.
    """
    check_processor(folder, shape)
    for name in COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    _, image = _image_settings(folder)
    if not (folder / TOKENIZER).is_file():
        _, tokenizer = _load_tokenizer(folder)
        tokenizer.save(str(target / TOKENIZER))
    if not (folder / TOKENIZER_CONFIG).is_file():
        _write_json(target / TOKENIZER_CONFIG, tokenizer_config(image.get("processor_class", "Glm4vProcessor")))
    if not (folder / VIDEO_CONFIG).is_file() and (folder / IMAGE_CONFIG).is_file():
        _write_json(target / VIDEO_CONFIG, _video_settings(image))
    if not (folder / GENERATION_CONFIG).is_file():
        _write_json(target / GENERATION_CONFIG, generation_config_json(shape))


def _video_settings(image: dict[str, Any]) -> dict[str, Any]:
    shared = {key: image[key] for key in VIDEO_SHARED if key in image}
    name = CLASSES[image.get("processor_class", "Glm4vProcessor")]
    return {"video_processor_type": name, "size": VIDEO_SIZE, "fps": 2, **shared}


def _load_tokenizer(folder: Path) -> tuple[Path, Tokenizer]:
    """The folder's fast tokenizer, converted where there is a SentencePiece model alone; with the file it is from."""
    path, model = folder / TOKENIZER, folder / SENTENCEPIECE
    if path.is_file():
        try:
            return path, Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001  (the library raises nothing narrower)
            raise ProcessorError(f"{path}: not a tokenizer ({' '.join(str(error).split())[:200]})") from None
    if model.is_file():
        return model, convert_sentencepiece(model.read_bytes(), str(model))
    raise ProcessorError(f"{folder}: no {TOKENIZER} and no {SENTENCEPIECE}; name a folder with tokenizer, template and limits")


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG
    if path.is_file():
        return _read_json(path)
    if (folder / TOKENIZER).is_file():
        raise ProcessorError(f"{folder}: no {TOKENIZER_CONFIG}; it names the tokenizer's end and padding tokens")
    return tokenizer_config("Glm4vProcessor")


def _named_token(folder: Path, settings: dict[str, Any], key: str) -> str:
    older = folder / "special_tokens_map.json"
    token = settings.get(key) or (_read_json(older).get(key) if older.is_file() else None)
    if not token:
        raise ProcessorError(f"{folder / TOKENIZER_CONFIG}: names no {key}")
    return _text(token)


def _text(token: Any) -> str:
    """The text of a token given as such, or as the tree of one with properties."""
    return str(token["content"] if isinstance(token, dict) else token)


def _image_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The image processor's settings and their file: the released layout, or the one file that transformers 5 saves."""
    path = folder / IMAGE_CONFIG
    if path.is_file():
        return path, _read_json(path)
    path = folder / PROCESSOR_CONFIG
    if not path.is_file():
        raise ProcessorError(f"{folder}: no {IMAGE_CONFIG} or {PROCESSOR_CONFIG}; without it no picture can be read")
    tree = _read_json(path)
    return path, {**tree, **(tree.get("image_processor") or {})}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProcessorError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ProcessorError(f"{path}: not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ProcessorError(f"{path}: not a tree of settings")
    return tree


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
