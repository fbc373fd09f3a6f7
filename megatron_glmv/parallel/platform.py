"""The one file that knows whether ranks run on CUDA with NCCL or on the CPU with gloo.

megatron-core 0.16.1 allocates on ``device="cuda"``, reads the CUDA generator and compares ``Tensor.type()`` with CUDA type
names. Where there is no CUDA device, `activate` gives torch's CUDA entry points harmless CPU meanings, so that the same,
unmodified Megatron runs on any machine. With one it replaces torch's AdamW alone, and only if Megatron finds neither
Transformer Engine nor apex: what it saves of torch's own, no new optimizer can load.

Source: the places in megatron-core 0.16.1 that need it are pipeline_parallel/{schedules,p2p_communication}.py,
tensor_parallel/{random,mappings,layers}.py, optimizer/{optimizer,distrib_optimizer,clip_grads}.py and
distributed/param_and_grad_buffer.py.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like", "zeros_like", "ones_like", "full_like")
_CUDA_TYPES = {torch.float32: "FloatTensor", torch.float16: "HalfTensor", torch.bfloat16: "BFloat16Tensor"}


def has_cuda() -> bool:
    """Whether ranks compute on CUDA devices."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else _CPU


def backend() -> str:
    """The collective backend of this platform."""
    return "nccl" if has_cuda() else "gloo"


def device_name() -> str:
    """The device's product name, for logs and the table of peaks."""
    return torch.cuda.get_device_name() if has_cuda() else "cpu"


def generator() -> torch.Generator:
    """The generator that Megatron's tracker of random states switches: the CUDA device's, or what stands for it."""
    return torch.cuda.default_generators[torch.cuda.current_device()] if has_cuda() else _generator


def activate() -> None:
    """Choose this rank's device; call before megatron.core is imported and before any process group exists."""
    # Megatron's and torch's advice to developers, once a rank, buries what a user must read.
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(megatron\.core|torch\.distributed)\..*")
    if has_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        from megatron.core import optimizer

        if optimizer.USING_PYTORCH_OPTIMIZER:
            _use_own_adam()
        return
    if issubclass(torch.optim.AdamW, AdamW):
        return
    # torch caches which functions `with torch.device(...)` reaches; the cache must hold the originals, or transformers'
    # loading on the meta device leaves buffers uninitialised.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    Tensor.type = _type_as_on_cuda(Tensor.type)  # type: ignore[method-assign]
    _replace_cuda_entry_points()
    compile_on_device, torch.compile = torch.compile, _as_it_is  # type: ignore[assignment]
    from megatron.core.tensor_parallel import random as megatron_random

    torch.compile = compile_on_device

    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: _generator.set_state(state)
    _use_own_adam()
    from megatron.core.distributed import param_and_grad_buffer as buffers

    buffers.dist_all_gather_func = _unless_alone(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = _unless_alone(buffers.dist_reduce_scatter_func)


def _use_own_adam() -> None:
    """Have Megatron build `AdamW` below where it would build torch's own; it takes the class from torch each time."""
    torch.optim.AdamW = AdamW  # type: ignore[misc, assignment]
    from megatron.core.optimizer import distrib_optimizer

    # Where `AdamW` keeps its step count: the distributed optimizer's checkpoint looks there if it believes in apex.
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """What Megatron's fused functions are compiled with: nothing, which spares every rank the compiler's loading."""
    return function


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective of the distributed optimizer that does nothing where one rank's share is the whole buffer.

    There NCCL sees that it would write a buffer onto itself; gloo copies it, twice.
    """

    @functools.wraps(collective)
    def run(*args: Any, group: Any, **kwargs: Any) -> Any:
        return collective(*args, group=group, **kwargs) if dist.get_world_size(group) > 1 else None

    return run


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A tensor factory that reads device="cuda" as the CPU."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Tensor:
        where = kwargs.get("device")
        if where is not None and str(where).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


def _type_as_on_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type()` with the names that Megatron's optimizers compare with."""

    @functools.wraps(original)
    def type_of(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None and self.dtype in _CUDA_TYPES:
            return f"torch.cuda.{_CUDA_TYPES[self.dtype]}"
        return original(self, dtype, *args, **kwargs)

    return type_of


# Stands for the CUDA generator: a state of its own, apart from the CPU's, so that Megatron's tracker can switch it.
_generator = torch.Generator()


class _Stream:
    """A stream on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...


def _replace_cuda_entry_points() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.is_current_stream_capturing = lambda: False
    for name in ("synchronize", "set_device", "empty_cache"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.Stream = cuda.Event = _Stream
    cuda.stream = cuda.current_stream = cuda.default_stream = _Stream
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: None
    cuda.random.get_rng_state = cuda.get_rng_state = lambda device="cuda": _generator.get_state()
    cuda.random.set_rng_state = cuda.set_rng_state = lambda state, device="cuda": _generator.set_state(state)
    cuda.random.manual_seed = cuda.manual_seed = _generator.manual_seed


class AdamW(torch.optim.Optimizer):
    """Decoupled Adam that keeps `step` in the parameter group, as apex's and Transformer Engine's FusedAdam do.

    Megatron's ``fully_reshardable`` optimizer checkpoint reads and writes `step` there; torch's own AdamW keeps it per
    parameter. The update is torch's fused kernel, which wants the count on the parameters' device.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                state = self.state[p]
                if "exp_avg" not in state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            step = torch.full((), float(group["step"]), device=params[0].device)
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [step] * len(params),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
