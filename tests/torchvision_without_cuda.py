"""Lets torchvision's CUDA wheel import beside a CPU torch, in every process of the environment that has this as a .pth file.

Its compiled part does not load there, and its import then fails, because it registers Python kernels for operators that only
the compiled part declares. Pictures need the Python part alone, so the operators are declared first, when torchvision is first
looked for: torch is not loaded by a process that never asks for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_KEPT: list[object] = []


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)  # the declarations end with it
        return importlib.machinery.PathFinder.find_spec(fullname, path, target)


sys.meta_path.insert(0, _BeforeTorchvision())
