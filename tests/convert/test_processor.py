"""Processor folders: found from a checkpoint, refused when they belong to another model, copied whole and nothing more.

The copy is loaded as a client loads it, with AutoProcessor and AutoModelForImageTextToText, for both classes of the family.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer

from megatron_glmv.config.model import ModelShape
from megatron_glmv.convert.hf_config import config_json
from megatron_glmv.convert.processor import (
    CLASSES,
    COPIED,
    VIDEO_SIZE,
    ProcessorError,
    check_processor,
    check_tokenizer,
    copy_processor,
    find_processor,
)
from megatron_glmv.data.fast_tokenizer import TokenizerError
from tests.data.processor import write_processor
from tests.model import oracle

RELEASED = {
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json",
    "video_preprocessor_config.json", "generation_config.json",
}  # fmt: skip
"""What GLM-4.1V's and GLM-4.6V's folders hold beside README, config.json and weights."""


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    tree = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}), encoding="utf-8")


def rename_tokens(folder: Path, names: dict[str, str]) -> None:
    """Give tokens of tokenizer.json other texts."""
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    for number, old in enumerate(names):
        text = text.replace(json.dumps(old), f'"@{number}@"')
    for number, new in enumerate(names.values()):
        text = text.replace(f'"@{number}@"', json.dumps(new))
    path.write_text(text, encoding="utf-8")


def write_flash_processor(folder: Path) -> Path:
    """The processor of the oracle's flash variant: GLM-4.6V's classes, media tokens under other ids."""
    write_processor(folder)
    rename_tokens(
        folder, {"<|image|>": "<answer>", "<answer>": "<|image|>", "<|video|>": "</answer>", "</answer>": "<|video|>"}
    )
    (folder / "tokenizer.model").unlink()
    edit(folder / "tokenizer_config.json", processor_class="Glm46VProcessor")
    edit(folder / "preprocessor_config.json", processor_class="Glm46VProcessor", image_processor_type="Glm46VImageProcessor")
    edit(
        folder / "video_preprocessor_config.json",
        processor_class="Glm46VProcessor",
        video_processor_type="Glm46VVideoProcessor",
    )
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {"digits": write_processor, "flash": write_flash_processor}
SHAPE = oracle.model_shape("digits")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_processor(tmp_path_factory.mktemp("written") / "processor")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A private processor folder, to be spoilt."""
    return shutil.copytree(written, tmp_path / "processor")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "hf").mkdir()
    return tmp_path / "hf"


def refused(folder: Path, part: str, shape: ModelShape = SHAPE) -> None:
    with pytest.raises((ProcessorError, TokenizerError)) as caught:
        check_processor(folder, shape)
    message = str(caught.value)
    assert part in message
    assert str(folder) in message
    assert "\n" not in message


@pytest.mark.parametrize("variant", WRITERS)
def test_a_client_loads_processor_and_model_of_both_classes(variant: str, tmp_path: Path, torchvision_shim: ModuleType) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    shape, target = oracle.model_shape(variant), tmp_path / "hf"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config_json(shape, "float32")))
    random = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(target))
    save_file(random.state_dict(), target / "model.safetensors", {"format": "pt"})
    source = WRITERS[variant](tmp_path / "processor")
    (source / "video_preprocessor_config.json").unlink()
    copy_processor(source, target, shape)

    processor = AutoProcessor.from_pretrained(target)
    family = {"digits": "Glm4v", "flash": "Glm46V"}[variant]
    assert type(processor).__name__ == f"{family}Processor"
    assert type(processor.image_processor).__name__ == f"{family}ImageProcessor"
    assert type(processor.video_processor).__name__ == f"{family}VideoProcessor" == CLASSES[f"{family}Processor"]
    assert processor.image_processor.size["longest_edge"] == 9_633_792
    assert {edge: processor.video_processor.size[edge] for edge in VIDEO_SIZE} == VIDEO_SIZE
    model, loading = AutoModelForImageTextToText.from_pretrained(target, output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(model).__name__ == f"{family}ForConditionalGeneration"
    assert model.generation_config.eos_token_id == list(shape.tokens.eos)

    item = [{"type": "image", "image": Image.new("RGB", (56, 84), (200, 10, 10))}, {"type": "text", "text": "Read the digits."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": item}], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert int((inputs["input_ids"] == shape.tokens.image).sum()) == int(inputs["image_grid_thw"].prod()) // 4
    answer = model.generate(**inputs, max_new_tokens=3)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_config_json_keeps_the_class_of_the_family() -> None:
    for variant, name in (("digits", "Glm4vForConditionalGeneration"), ("flash", "Glm46VForConditionalGeneration")):
        tree = config_json(oracle.model_shape(variant), "bfloat16")
        assert tree["architectures"] == [name]
        assert ModelShape.from_hf(tree, "here") == oracle.model_shape(variant)


def test_what_a_released_folder_holds_is_copied_and_no_more(folder: Path, target: Path) -> None:
    for name in ("model.safetensors", "tokenizer.bin", "tokenization_glm.py", "weights.pkl", "README.md"):
        (folder / name).write_text("no", encoding="utf-8")
    copy_processor(folder, target, SHAPE)
    assert {path.name for path in target.iterdir()} == RELEASED | {"tokenizer.model"}
    for path in target.iterdir():
        if path.name != "generation_config.json":
            assert path.read_bytes() == (folder / path.name).read_bytes()
    generation = json.loads((target / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == list(SHAPE.tokens.eos)
    assert not [name for name in COPIED if not name.endswith((".json", ".jinja", ".model", ".txt"))]


def test_the_sources_own_generation_config_is_kept(folder: Path, target: Path) -> None:
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_k": 2}', encoding="utf-8")
    copy_processor(folder, target, SHAPE)
    assert json.loads((target / "generation_config.json").read_text(encoding="utf-8")) == {"do_sample": True, "top_k": 2}


def test_a_sentencepiece_model_alone_becomes_a_fast_tokenizer(folder: Path, target: Path) -> None:
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    copy_processor(folder, target, SHAPE)
    assert {path.name for path in target.iterdir()} == RELEASED | {"tokenizer.model"}
    check_tokenizer(target, SHAPE)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(target)
    for text in ("Read <|image|> 12", "<|user|>\n你好 🙂<|endoftext|>"):
        assert loaded(text, add_special_tokens=False)["input_ids"] == fast.encode(text, add_special_tokens=False).ids
    assert (loaded.pad_token_id, loaded.eos_token_id) == (SHAPE.tokens.pad, 1)


def test_a_broken_sentencepiece_model_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"not a model")
    refused(folder, "tokenizer.model: not a SentencePiece model")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("tokenizer_config.json", "no tokenizer_config.json"),
        ("chat_template.jinja", "no chat_template.jinja or chat_template.json"),
        ("preprocessor_config.json", "no preprocessor_config.json or processor_config.json"),
    ],
)
def test_a_missing_file_is_named(folder: Path, name: str, part: str) -> None:
    (folder / name).unlink()
    refused(folder, part)


def test_a_folder_without_any_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").unlink()
    refused(folder, "no tokenizer.json and no tokenizer.model")


def test_a_template_inside_the_tokenizer_config_will_do(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=template)
    check_processor(folder, SHAPE)


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (
            {"<|image|>": "<think>", "<think>": "<|image|>"},
            "tokenizer.json: <|image|> has id 19, the model was trained with 15",
        ),
        ({"<|video|>": "<|film|>"}, "tokenizer.json: has no token <|video|>, the model was trained with 16"),
        ({"<|begin_of_image|>": "<|end_of_image|>", "<|end_of_image|>": "<|begin_of_image|>"}, "has id 12, the model"),
        ({"<|begin_of_video|>": "<sop>", "<sop>": "<|begin_of_video|>"}, "<|begin_of_video|> has id 5"),
    ],
)
def test_special_tokens_under_other_ids_are_named(folder: Path, names: dict[str, str], part: str) -> None:
    rename_tokens(folder, names)
    refused(folder, part)


def test_the_relatives_tokenizer_is_refused_both_ways(folder: Path, tmp_path: Path) -> None:
    flash = write_flash_processor(tmp_path / "flash")
    refused(folder, "<|image|> has id 15, the model was trained with 21", oracle.model_shape("flash"))
    refused(flash, "<|image|> has id 21, the model was trained with 15")


@pytest.mark.parametrize(
    ("file", "changes", "part"),
    [
        ("tokenizer_config.json", {"pad_token": "[MASK]"}, "[MASK] has id 2, the model was trained with 1"),
        ("tokenizer_config.json", {"pad_token": {"content": "[MASK]"}}, "[MASK] has id 2, the model was trained with 1"),
        ("tokenizer_config.json", {"pad_token": None}, "names no pad_token"),
        ("tokenizer_config.json", {"eos_token": "[MASK]"}, "[MASK] has id 2, the model was trained with 1 or 8 or 10 or 22"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"3": {"content": "[MASK]"}}},
            "[MASK] has id 3, and 2 in tokenizer",
        ),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a.B", None]}}, "asks for code of the folder (auto_map)"),
        ("preprocessor_config.json", {"auto_map": {}}, "asks for code of the folder (auto_map)"),
        ("preprocessor_config.json", {"processor_class": "Qwen2VLProcessor"}, "processor_class is 'Qwen2VLProcessor'"),
        ("preprocessor_config.json", {"patch_size": 16}, "patch_size is 16, the model's is 14"),
        ("preprocessor_config.json", {"merge_size": 1}, "merge_size is 1, the model's is 2"),
    ],
)
def test_settings_of_another_model_are_named(folder: Path, file: str, changes: dict[str, Any], part: str) -> None:
    edit(folder / file, **changes)
    refused(folder, part)


def test_an_id_beyond_the_vocabulary_is_named(folder: Path) -> None:
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_tokens([AddedToken("<|new|>")])
    fast.save(str(folder / "tokenizer.json"))
    refused(folder, "'<|new|>' has id 384, the model's vocabulary ends before 384")


def test_a_stop_that_the_tokenizer_lacks_is_named(folder: Path) -> None:
    tokens = SHAPE.tokens.model_copy(update={"eos": (1, 500)})
    refused(folder, "has no token 500, at which the model's answers end", SHAPE.model_copy(update={"tokens": tokens}))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", ["", "[1]", '{"version": '])
def test_files_that_are_not_what_they_are_called_are_named(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content, encoding="utf-8")
    refused(folder, f"{file}: not ")


def test_what_transformers_5_saves_is_accepted(folder: Path, target: Path, torchvision_shim: ModuleType) -> None:
    from transformers import AutoProcessor

    saved = folder.with_name("saved")
    AutoProcessor.from_pretrained(folder).save_pretrained(saved)
    assert (saved / "processor_config.json").is_file()
    assert not (saved / "preprocessor_config.json").exists()
    copy_processor(saved, target, SHAPE)
    assert not (target / "video_preprocessor_config.json").exists(), "the one file holds the video settings"
    assert AutoProcessor.from_pretrained(target).video_processor.size["longest_edge"] == 47_040_000


def write_checkpoint(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text("{}", encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


def write_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def test_the_processor_is_found_in_order(tmp_path: Path) -> None:
    data = write_tokenizer(tmp_path / "data" / "processor")
    source = {"data": {"sources": [{"path": str(tmp_path / "data")}, {"path": "other"}]}}
    first = write_checkpoint(tmp_path / "first/checkpoints/step_00000010", **source)
    assert find_processor(first) == data
    start = {"checkpoint": {"start_from": str(tmp_path / "first")}, "data": {"sources": [{"path": "nowhere"}]}}
    second = write_checkpoint(tmp_path / "second" / "step_00000020", **start)
    assert find_processor(second) == data, "a run's folder stands for its newest checkpoint"
    released = write_tokenizer(tmp_path / "released")
    third = write_checkpoint(tmp_path / "third" / "step_00000030", **start, model={"hf_folder": str(released)})
    assert find_processor(third) == released
    own = write_tokenizer(third / "processor")
    assert find_processor(third) == own


def test_a_processor_that_is_nowhere_is_one_clear_line(tmp_path: Path) -> None:
    loop = tmp_path / "step_00000010"
    write_checkpoint(loop, checkpoint={"start_from": str(loop)}, model={"hf_folder": "gone"}, data={"sources": []})
    with pytest.raises(ProcessorError, match=r"step_00000010: no tokenizer in .*processor, gone; pass --processor FOLDER"):
        find_processor(loop)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ProcessorError, match=r"no tokenizer in .*bare/processor; pass --processor FOLDER"):
        find_processor(tmp_path / "bare")
