"""Ask an exported Hugging Face folder about held-out pictures and clips, with plain transformers, and score it per task.

Nothing of megatron_glmv is imported: whatever this prints, any user of the exported folder gets.

    python examples/quickstart_evaluate.py HF_FOLDER EVAL.jsonl OUT.json

EVAL.jsonl is what `glmv-data digits` writes. read, count, add and watch are right when the answer is exactly the truth, point
when the box and the true one overlap with an intersection over union above 0.5.

The chance level is what the best blind guesser reaches: for every kind of question (digits in its text do not count) it gives
the one answer that is right most often on these very samples, without looking at the picture.

Source: transformers 5.23.0, models/glm4v/processing_glm4v.py (`replace_video_token`, `create_mm_token_type_ids`) and
video_processing_glm4v.py (`_preprocess`, of which resizing alone needs torchvision, and is done here by what that calls).
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor, smart_resize
from transformers.video_utils import read_video_pyav

IMAGE_TOKEN, VIDEO_TOKEN = "<|image|>", "<|video|>"
TOKEN_TYPES = {"image": 1, "video": 2}
IOU_NEEDED = 0.5
_BOX = re.compile(r"\[\[(\d+),(\d+),(\d+),(\d+)\]\]")


@dataclass(frozen=True)
class Question:
    """One held-out sample, ready for the model. P = patches.

    Attributes:
        sample: the record of the JSONL file.
        kind: image or video.
        path: of its picture or video.
        ids: prompt tokens, the placeholder expanded.
        patches: [P, values of a patch] float32.
        grid: [1, 3] int64, temporal patches, rows and columns of patches.
    """

    sample: dict[str, Any]
    kind: str
    path: Path
    ids: list[int]
    patches: Tensor
    grid: Tensor


class Answerer:
    """A model, its tokenizer and its processors of pictures and videos, loaded from one folder.

    Raises:
        SystemExit: a tensor of the model is missing in the folder, unknown, or of another shape; transformers would only warn.
    """

    def __init__(self, folder: Path) -> None:
        self.model, loading = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        faults = {kind: sorted(map(str, names)) for kind, names in loading.items() if names}
        if faults:
            raise SystemExit(f"{folder}: does not load as it should: {faults}")
        self.model.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
        self.images = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        self.videos = Glm4vVideoProcessor.from_pretrained(folder, local_files_only=True)
        self.image_id = self.model.config.image_token_id

    def prepare(self, sample: dict[str, Any], folder: Path) -> Question:
        """Tokens and patches of a sample whose paths are relative to `folder`."""
        messages = [message for message in sample["messages"] if message["role"] != "assistant"]
        (item,) = [item for message in messages for item in message["content"] if item["type"] != "text"]
        path = folder / item[item["type"]]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if item["type"] == "video":
            patches, grid, seconds = self.read_video(path)
            tokens = IMAGE_TOKEN * (int(grid[0, 1:].prod()) // self.videos.merge_size**2)
            written = (f"<|begin_of_image|>{tokens}<|end_of_image|>{int(second)}" for second in seconds)
            text = text.replace(VIDEO_TOKEN, "".join(written))
        else:
            with Image.open(path) as picture:
                vision = self.images(picture.convert("RGB"), return_tensors="pt")
            patches, grid = vision["pixel_values"], vision["image_grid_thw"]
            text = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * (int(grid.prod()) // self.images.merge_size**2))
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Question(sample, item["type"], path, ids, patches, grid)

    def read_video(self, path: Path) -> tuple[Tensor, Tensor, list[float]]:
        """Patches [P, values] float32, grid [1, 3] int64, and the second of each temporal patch."""
        videos = self.videos
        frames, metadata = read_video_pyav(str(path), videos.sample_frames)
        size = (len(metadata.frames_indices), *frames.shape[1:3], videos.temporal_patch_size)
        factor = videos.patch_size * videos.merge_size
        height, width = smart_resize(*size, factor, videos.size["shortest_edge"], videos.size["longest_edge"])
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
        if pixels.shape[2:] != (height, width):
            pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(values)[:, None, None] for values in (videos.image_mean, videos.image_std))
        pixels = ((pixels * videos.rescale_factor - mean) / std).contiguous()[None]
        patches, *grid = videos.patchify(pixels, videos.patch_size, videos.merge_size, videos.temporal_patch_size)
        return patches[0], torch.tensor([grid]), metadata.timestamps[:: videos.temporal_patch_size]

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """Greedy answers to questions of one kind; prompts are padded on the left, which changes no answer."""
        padded = self.tokenizer.pad({"input_ids": [question.ids for question in questions]}, return_tensors="pt")
        kind = questions[0].kind
        inputs = {
            "input_ids": padded["input_ids"],
            "attention_mask": padded["attention_mask"],
            "mm_token_type_ids": (padded["input_ids"] == self.image_id) * TOKEN_TYPES[kind],
            "pixel_values_videos" if kind == "video" else "pixel_values": torch.cat([q.patches for q in questions]),
            f"{kind}_grid_thw": torch.cat([question.grid for question in questions]),
        }
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = output[:, padded["input_ids"].shape[1] :]
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def longest_answer(self, samples: Sequence[dict[str, Any]]) -> int:
        """Tokens of the longest true answer and the token that ends it."""
        return 1 + max(map(len, self.tokenizer([true_answer(s) for s in samples], add_special_tokens=False)["input_ids"]))


def true_answer(sample: dict[str, Any]) -> str:
    """What the model was taught to write; `answer` of the record is what a verifier reads."""
    return "".join(item["text"] for item in sample["messages"][-1]["content"])


def batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Questions about media of one kind and shape: convolutions on the CPU are set up anew for every number of patches."""
    by_shape: dict[tuple[str, ...], list[Question]] = defaultdict(list)
    for question in questions:
        by_shape[question.kind, str(question.grid.tolist())].append(question)
    for alike in by_shape.values():
        alike.sort(key=lambda question: (question.sample["task"], len(question.ids)))
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def box_overlap(first: str, second: str) -> float:
    """Intersection over union of two answers' boxes; 0 where one of them has no box."""
    boxes = [_BOX.search(text) for text in (first, second)]
    if not all(boxes):
        return 0.0
    (a1, b1, a2, b2), (c1, d1, c2, d2) = ([int(edge) for edge in box.groups()] for box in boxes if box)
    shared = max(0, min(a2, c2) - max(a1, c1)) * max(0, min(b2, d2) - max(b1, d1))
    total = max(0, a2 - a1) * max(0, b2 - b1) + max(0, c2 - c1) * max(0, d2 - d1) - shared
    return shared / total if total else 0.0


def is_right(task: str, answer: str, truth: str) -> bool:
    """Whether an answer counts."""
    return box_overlap(answer, truth) > IOU_NEEDED if task == "point" else answer == truth


def chance_level(samples: Sequence[dict[str, Any]]) -> float:
    """Share of the samples of one task that the best blind guesser gets right."""
    truths: dict[str, list[str]] = defaultdict(list)
    for sample in samples:
        question = " ".join(item["text"] for item in sample["messages"][0]["content"] if item["type"] == "text")
        truths[re.sub(r"\d+", "#", question)].append(true_answer(sample))
    task = samples[0]["task"]
    best = (max(sum(is_right(task, guess, truth) for truth in kind) for guess in set(kind)) for kind in truths.values())
    return sum(best) / len(samples)


def score(samples: Sequence[dict[str, Any]], answers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Accuracy, chance level and number of samples of every task."""
    tasks: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        tasks[sample["task"]].append(index)
    return {
        task: {
            "accuracy": sum(is_right(task, answers[i], true_answer(samples[i])) for i in found) / len(found),
            "chance": chance_level([samples[i] for i in found]),
            "samples": len(found),
        }
        for task, found in sorted(tasks.items())
    }


def evaluate(folder: Path, data: Path, num_samples: int, batch: int) -> dict[str, Any]:
    """Ask about the first `num_samples` samples of `data`; returns the report."""
    started = time.monotonic()
    answerer = Answerer(folder)
    with data.open(encoding="utf-8") as lines:
        samples = [json.loads(line) for line, _ in zip(lines, range(num_samples), strict=False)]
    questions = [answerer.prepare(sample, data.parent) for sample in samples]
    longest = answerer.longest_answer(samples)
    answers: dict[str, str] = {}
    with tqdm(total=len(questions), desc="evaluate", unit=" questions") as bar:
        for group in batches(questions, batch):
            answers |= zip((question.sample["id"] for question in group), answerer.answer(group, longest), strict=True)
            bar.update(len(group))
    shown = next((question for question in questions if question.sample["task"] == "read"), questions[0])
    return {
        "tasks": score(samples, [answers[sample["id"]] for sample in samples]),
        "shown": {"picture": str(shown.path), "answer": answers[shown.sample["id"]], "truth": true_answer(shown.sample)},
        "parameters": answerer.model.num_parameters(),
        "seconds": round(time.monotonic() - started, 1),
        "answers": answers,
    }


def main() -> None:
    """Evaluate, print the table, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="HF_FOLDER")
    parser.add_argument("data", type=Path, metavar="EVAL.jsonl")
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--samples", type=int, default=600, help="how many of the file's samples (default %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="questions answered at a time (default %(default)s)")
    arguments = parser.parse_args()
    report = evaluate(arguments.folder, arguments.data, arguments.samples, arguments.batch)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{'task':<8}{'right':>8}{'chance':>8}{'samples':>9}")
    for task, found in report["tasks"].items():
        print(f"{task:<8}{found['accuracy']:>8.1%}{found['chance']:>8.1%}{found['samples']:>9}")
    shown = report["shown"]
    print(f"held-out picture {shown['picture']}\n  model: {shown['answer']}\n  truth: {shown['truth']}")
    print(f"{report['parameters']:,} parameters, loaded by transformers, {report['seconds']} s; report in {arguments.out}")


if __name__ == "__main__":
    main()
