"""The proof that a Hugging Face folder and a checkpoint are one model, and the file that keeps it: parity.json."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_glmv.config.model import ModelConfig
from megatron_glmv.config.weight_map import check_hf_shapes, entries
from megatron_glmv.convert.checkpoint_tensors import Stored
from megatron_glmv.convert.compare import Run, different_tensors, run_megatron, run_transformers
from megatron_glmv.convert.hf_folder import HfWeights
from megatron_glmv.convert.probe import DOCUMENTS, make_probe
from megatron_glmv.run_folder.checkpoint_folder import PARTIAL, check_architecture, origin, read_manifest

PARITY = "parity.json"
TOLERANCE = 5e-4
"""Largest difference of two logits, in standard deviations of all of them. Measured: 1e-5 on tiny models, 6e-5 on the 9B with
random weights, both noise of float32; the smallest known fault, a tanh GELU for the exact one, moves them by 2e-3."""
Progress = Callable[[str, float], object]
"""Is told what has been worked on and which share of the whole it was."""


@dataclass(frozen=True)
class Parity:
    """What a comparison found.

    Attributes:
        checkpoint: what its manifest says: step, layout, dtype, commit.
        versions: of the packages that compared.
        files: sha256 of each file of the Hugging Face folder.
        num_tensors: how many were compared to the bit.
        different_tensors: name -> what is different.
        logits: document -> its worst logit difference, in standard deviations of the logits.
        stages: part of the model -> worst difference of its output, in standard deviations of that.
        failure: why the two are not one model, in one line; None when they are.
    """

    checkpoint: dict[str, Any]
    versions: dict[str, Any]
    files: dict[str, str]
    num_tensors: int
    different_tensors: dict[str, str]
    logits: dict[str, float]
    stages: dict[str, float]
    failure: str | None

    def write(self, path: Path) -> None:
        """Keep it as JSON, with the tolerance and the time."""
        tree = {"passed": self.failure is None, "tolerance": TOLERANCE, "compared_at": time.time(), **asdict(self)}
        path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")

    def lines(self) -> list[str]:
        """A summary for people."""
        same = self.num_tensors - len(self.different_tensors)
        found = [f"tensors: {same} of {self.num_tensors} equal to the bit"]
        found += [f"  {name}: {what}" for name, what in list(self.different_tensors.items())[:10]]
        if self.logits:
            found.append(f"logits, worst difference in standard deviations (tolerance {TOLERANCE:g}):")
            found += [f"  {name}: {worst:.1e}" for name, worst in self.logits.items()]
        return [*found, f"FAILED: {self.failure}" if self.failure else "passed: one model"]


def compare(hf_folder: Path, checkpoint: Path, stored: Stored, progress: Progress = lambda what, share: None) -> Parity:
    """Compare a Hugging Face folder with a checkpoint: every tensor, then the logits of the probe rows.

    Args:
        hf_folder: config.json and safetensors.
        checkpoint: one complete checkpoint; its manifest is read.
        stored: its tensors.
        progress: is told what is done.

    Raises:
        InputError: one of the two cannot be read, is not of this family, or they are of different architectures.
    """
    manifest = read_manifest(checkpoint)
    shape = ModelConfig(hf_folder=hf_folder).shape
    check_architecture(checkpoint, manifest, shape)
    weights = HfWeights(hf_folder)
    check_hf_shapes(weights.shapes, shape, str(hf_folder))
    num_bytes = sum(math.prod(size) * weights.dtypes[name].itemsize for name, size in weights.shapes.items())
    with ThreadPoolExecutor(1) as pool:  # reading and hashing leave the interpreter to the comparison
        hashes = pool.submit(file_hashes, hf_folder)
        different = dict(different_tensors(weights, stored, shape, lambda done: progress("tensors", done / num_bytes)))
        files = hashes.result()
    share = 1 / len(_units(manifest["shape"]))
    reference = run_transformers(hf_folder, weights, shape, lambda unit: progress("transformers", share))
    found = run_megatron(stored, shape, lambda unit: progress("Megatron", share))
    logits, stages = _logit_differences(reference, found, make_probe(shape).lengths), _stage_differences(reference, found)
    return Parity(
        checkpoint={key: manifest.get(key) for key in ("step", "layout", "dtype", "commit")}
        | {"name": checkpoint.name.removesuffix(PARTIAL)},
        versions=origin()["versions"],
        files=files,
        num_tensors=sum(len(found.hf_names) for found in entries(shape).values()),
        different_tensors=different,
        logits=logits,
        stages=stages,
        failure=_failure(different, logits, stages),
    )


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder but the proof itself."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != PARITY:
            with path.open("rb") as stream:
                found[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _units(shape: dict[str, Any]) -> range:
    return range(shape["vision"]["num_layers"] + 1 + shape["text"]["num_layers"])


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Worst absolute difference in standard deviations of the reference; infinite if one side is not finite."""
    worst = float((ours - theirs).abs().max() / theirs.std())
    return worst if math.isfinite(worst) else math.inf


def _logit_differences(reference: Run, found: Run, lengths: tuple[int, ...]) -> dict[str, float]:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    scale = reference.logits.std()
    return {
        name: _difference(found.logits[a:b] / scale, reference.logits[a:b] / scale)
        for name, (a, b) in zip(DOCUMENTS, pairwise(ends), strict=True)
    }


def _stage_differences(reference: Run, found: Run) -> dict[str, float]:
    return {name: _difference(ours, theirs) for (name, theirs), (_, ours) in zip(reference.stages, found.stages, strict=True)}


def _failure(different: dict[str, str], logits: dict[str, float], stages: dict[str, float]) -> str | None:
    if different:
        name, what = next(iter(different.items()))
        rest = f", and {len(different) - 1} more tensors" if len(different) > 1 else ""
        return f"{name}: {what}{rest}"
    worst = max(logits, key=logits.__getitem__)
    if logits[worst] > TOLERANCE:
        first = next((name for name, difference in stages.items() if difference > TOLERANCE), "the output layer")
        return (
            f"every tensor is equal, but the logits of the probe {worst!r} differ by {logits[worst]:.1e} standard deviations "
            f"(tolerance {TOLERANCE:g}); the first part of the model that differs is {first}"
        )
    return None
