"""The test environment's own promise: torchvision is there on demand and nowhere else."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import numpy as np
import transformers
from PIL import Image
from transformers.utils import is_torchvision_available


def test_transformers_sees_no_torchvision_outside_the_fixture():
    if "torchvision" not in sys.modules:
        assert importlib.util.find_spec("torchvision") is None
        assert not is_torchvision_available()


def test_torchvision_processor_works_inside_the_fixture(torchvision_shim: ModuleType):
    inside = importlib.import_module("transformers")
    assert inside is not transformers
    processor = inside.Glm4vImageProcessor()
    assert processor.__class__.__module__.endswith("image_processing_glm4v"), "the torchvision backend, not PIL's"
    picture = Image.fromarray(np.zeros((40, 60, 3), np.uint8))
    assert processor(images=[picture], return_tensors="pt")["pixel_values"].shape == (48, 1176)
