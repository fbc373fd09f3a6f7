"""The names that a rank's modules have in the whole model.

With pipeline stages a layer's index in a chunk is local; the layer itself knows its number in the whole tower.
"""

from __future__ import annotations

import re

from torch import nn

_LAYER = re.compile(r"(.*\.decoder\.layers)\.\d+")


def full_module_names(chunk: nn.Module) -> dict[str, str]:
    """Name in the whole model of every module of an unwrapped chunk, by its name in the chunk; "" is the chunk itself."""
    full: dict[str, str] = {}
    for name, module in chunk.named_modules():
        if _LAYER.fullmatch(name):
            full[name] = f"{name.rpartition('.')[0]}.{int(module.layer_number) - 1}"
        elif match := _LAYER.match(name):
            full[name] = full[match[0]] + name[match.end() :]
        else:
            full[name] = name
    return full
