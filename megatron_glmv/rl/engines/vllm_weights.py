"""New weights for vLLM servers: one order of steps for every server, and the ways in which the tensors travel.

    pause -> load -> empty the three caches -> name the version -> resume

The order is not free. Weights that are loaded without a pause, while the server still believes in pictures that its worker has
dropped, end its process with the next known picture; caches that survive a load answer with features of the old tower, in
silence. A load that fails leaves a server that must be started again: it stays paused, so no answer comes from half of the
new weights.

Source: vLLM 0.32.0, entrypoints/rl/online/api_router.py, entrypoints/serve/dev (paths); v1/worker/gpu_model_runner.py
(`reload_weights`, which the CPU's runner shares), measured on a running server.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_glmv.config.engines import DiskWeights
from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.weight_map import MappingError, hf_names
from megatron_glmv.convert.hf_folder import write_weights
from megatron_glmv.convert.new_folder import new_folder
from megatron_glmv.rl.engines.engine import EngineError
from megatron_glmv.rl.engines.vllm_servers import ServerGone, Servers

CACHES = ("prefix", "mm", "encoder")
_TRIES, _WAIT_S = 50, 0.1
"""For the prefix cache, whose blocks requests that were just aborted hold for a moment."""
_FOLDER = re.compile(r"weights-\d+")


@dataclass(frozen=True)
class Load:
    """What makes a server load the weights: a path and what is posted to it; where they lie, for messages."""

    path: str
    body: Mapping[str, Any]
    where: str


def load_from(folder: Path) -> Load:
    """Weights that lie in a folder already."""
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    return Load("/collective_rpc", body, str(folder))


class DiskTransport:
    """Weights as a folder of safetensors, written under another name and renamed when whole.

    Args:
        config: the folder.
        shape: the architecture.
        dtype: in which they are written; the server casts them to its own.
    """

    def __init__(self, config: DiskWeights, shape: ModelShape, dtype: torch.dtype) -> None:
        self._folder, self._shape, self._dtype = config.folder.absolute(), shape, dtype

    def send(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> Load:
        """Write the weights.

        Raises:
            EngineError: a tensor is unknown, of another shape, or missing; or the disk is full or refuses.
        """
        target = self._folder / f"weights-{version}"
        sizes = hf_names(self._shape)
        dtypes = dict.fromkeys(sizes, self._dtype)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)  # of a run that was stopped and goes on from before this version
            with new_folder(target) as partial:
                write_weights(partial, sizes, dtypes, _in_order(tensors, sizes, self._dtype))
        except (MappingError, OSError) as error:
            raise EngineError(f"weights {version} cannot be handed to the servers: {error}") from None
        return load_from(target)

    def clean(self, version: int) -> None:
        """Remove what earlier updates wrote, once every server has loaded this version."""
        for folder in self._folder.iterdir():
            if _FOLDER.fullmatch(folder.name) and folder.name != f"weights-{version}":
                shutil.rmtree(folder, ignore_errors=True)


def _in_order(
    tensors: Iterable[tuple[str, Tensor]], sizes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors in the order of `sizes`; those that come early wait."""
    due, waiting = iter(sizes), {}
    name = next(due, None)
    for given, tensor in tensors:
        if tuple(tensor.shape) != sizes.get(given):
            raise EngineError(f"the vLLM engine has no tensor {given} of {list(tensor.shape)}")
        waiting[given] = tensor.detach().to(dtype)
        while name in waiting:
            yield name, waiting.pop(name)
            name = next(due, None)
    if name is not None:
        missing = [name, *(other for other in due if other not in waiting)]
        raise EngineError(f"new weights lack {missing[0]} and {len(missing) - 1} more tensors")


def renew(servers: Servers, url: str, load: Load, version: int) -> None:
    """Bring one server to new weights.

    Raises:
        ServerGone: it is gone, or a step failed; then the server stays paused and has to be started again.
        EngineError: it lacks what every server needs.
    """

    def post(path: str, body: Mapping[str, Any], *, long: bool = False) -> Any:
        return servers.order(url, path, body, lambda reply: reply, long=long)

    # Nobody waits for answers now; what an earlier run left there is given up.
    post("/pause?mode=abort", {}, long=True)
    try:
        post(load.path, load.body, long=True)
    except ServerGone as gone:
        if not gone.answered:
            raise
        raise ServerGone(f"{gone}; does this server see {load.where}? It must be started again") from None
    except EngineError as error:
        raise EngineError(f"{error}; does this server see {load.where}? It must be started again") from None
    for cache in CACHES:
        _reset(servers, url, cache)
    post("/update_weight_version", {"new_version": str(version)})
    post("/resume", {})


def served_version(servers: Servers, url: str) -> str:
    """The version that a server says it serves.

    Raises:
        ServerGone: it does not answer.
        EngineError: another reply.
    """
    return servers.order(url, "/weight_info", None, lambda reply: str(reply["weight_version"]))


def _reset(servers: Servers, url: str, cache: str) -> None:
    for _ in range(_TRIES):
        reply = servers.order(url, f"/reset_{cache}_cache", {}, lambda reply: reply)
        if reply is None or reply.get("success", True):
            return
        time.sleep(_WAIT_S)
    raise ServerGone(f"the {cache} cache cannot be emptied, requests still hold it; start the server again", answered=True)
