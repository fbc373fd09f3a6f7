"""An untrained model in a Hugging Face folder, and held-out samples of every task to ask it about."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_tools.cli import main as run_tool
from tests.examples.samples import NUM_SAMPLES
from tests.model import oracle


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out samples of every task and a processor folder made from the training samples."""
    folder = tmp_path_factory.mktemp("digits")
    assert run_tool(["digits", str(folder / "raw"), "--train", "60", "--eval", str(NUM_SAMPLES)]) == 0
    options = ["--input", str(folder / "raw" / "train.jsonl"), "--min-pixels", "1568"]
    assert run_tool(["train-tokenizer", str(folder / "processor"), *options]) == 0
    return folder


@pytest.fixture(scope="session")
def hf_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preset of the quickstart with random weights."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    oracle.random_model("digits", seed=5).save_pretrained(folder)
    shutil.copytree(data / "processor", folder, dirs_exist_ok=True)
    return folder
