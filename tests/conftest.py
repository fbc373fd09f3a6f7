"""Fixtures that several test packages share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.ranks import PARITY_PACKAGES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of SLURM come first: much of their time they wait for its clocks, while other files go on beside them."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


@cache
def _declare_torchvision_operators() -> torch.library.Library:
    """Declare the operators for which torchvision registers Python kernels at import.

    Its wheel is built for CUDA; beside a CPU torch the compiled part that declares them does not load, and the import fails
    with "operator torchvision::nms does not exist". The image processors need the Python part only.
    """
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


@pytest.fixture(scope="module")
def torchvision_shim() -> Iterator[ModuleType]:
    """torchvision, importable for the tests of one module, with a transformers that sees it.

    Import transformers inside the test (or in a fixture that asks for this one): one imported before has already decided that
    there is no torchvision. Outside such a module pytest, and ranks that it spawns, never see torchvision.
    """
    if not (Path(PARITY_PACKAGES) / "torchvision").is_dir():
        pytest.fail(f"no torchvision in {PARITY_PACKAGES}; `bash tests/run.sh` installs it there")
    without = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "transformers"}
    for name in without:
        del sys.modules[name]
    sys.path.append(PARITY_PACKAGES)
    try:
        if torch.version.cuda is None:
            _declare_torchvision_operators()
        yield importlib.import_module("torchvision")
    finally:
        sys.path.remove(PARITY_PACKAGES)
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
        sys.modules.update(without)
