"""GPUs and what is assumed of them: the table behind `glmv plan`, and behind the MFU that a run reports.

The peaks and bandwidths are the makers' figures; what of them a run reaches is an assumption, stated in every plan, and each
number can be replaced (`glmv plan --hardware FILE.yaml`). The efficiencies are round numbers in the range that is published for
Megatron with Transformer Engine on such machines; measure your own (`glmv preflight` prints them) and write them into the file.

Source: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM (dense peaks without sparsity, memory bandwidth, NVLink in
both directions together), of the DGX A100 (8 HDR adapters, 200 Gb/s each) and of the DGX H100 and H200 (8 ConnectX-7, 400 Gb/s
each); memory as nvidia-smi shows it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_glmv.config.base import Config, ConfigError, load_tree, validate


class Hardware(Config):
    """One GPU, its node, and how much of either a run is assumed to reach. Rates are in 10^9 a second, one direction."""

    name: str = "custom"
    product: str | None = None
    """Pattern of the whole product name that CUDA reports; null: not looked up."""
    memory_gb: float = Field(gt=0)
    """Device memory in 10^9 bytes."""
    fp32_tflops: float = Field(gt=0)
    """Dense peaks in 10^12 operations a second."""
    bf16_tflops: float = Field(gt=0)
    fp8_tflops: float | None = Field(default=None, gt=0)
    memory_gbs: float = Field(gt=0)
    """Memory bandwidth."""
    link_gbs: float = Field(gt=0)
    """Bandwidth of one GPU to its peers in the node."""
    network_gbs: float = Field(gt=0)
    """Bandwidth of one GPU to other nodes."""
    gpus_per_node: int = Field(default=8, ge=1)
    matmul_efficiency: float = Field(default=0.68, gt=0, le=1)
    """Of the peak in large bf16 (and fp32) products."""
    fp8_efficiency: float = Field(default=0.55, gt=0, le=1)
    """Of the FP8 peak in large products, casts included."""
    attention_efficiency: float = Field(default=0.45, gt=0, le=1)
    """Of the bf16 peak in fused attention, forward and backward together."""
    memory_efficiency: float = Field(default=0.75, gt=0, le=1)
    """Of the memory bandwidth in norms, activations, rotary, losses and the optimizer."""
    link_efficiency: float = Field(default=0.75, gt=0, le=1)
    """Of the links' bandwidth in collectives of the sizes that occur here."""
    network_efficiency: float = Field(default=0.75, gt=0, le=1)
    """The same between nodes."""
    latency_us: float = Field(default=15.0, ge=0)
    """Of one collective or message, in 10^-6 s."""
    overlap: float = Field(default=0.8, ge=0, le=1)
    """Share of the time in which traffic that is sent beside computation (gradients, weights, context) really hides."""
    overhead_gb: float = Field(default=3.0, ge=0)
    """Memory that is not torch's: CUDA context, kernels, cuBLAS workspaces, NCCL buffers, in 10^9 bytes."""
    fragmentation: float = Field(default=0.06, ge=0, lt=1)
    """Share by which torch's allocator holds more than the activations and temporary tensors that it gives out."""


A100, H100, H200 = (
    Hardware(
        name="a100",
        product=r"NVIDIA A100.*",
        memory_gb=85.9,
        fp32_tflops=19.5,
        bf16_tflops=312.0,
        memory_gbs=2039.0,
        link_gbs=300.0,
        network_gbs=25.0,
        matmul_efficiency=0.75,
        attention_efficiency=0.5,
    ),
    # The PCIe and NVL cards of the same family are slower, and not listed.
    Hardware(
        name="h100",
        product=r"NVIDIA H100 80GB HBM3",
        memory_gb=85.5,
        fp32_tflops=67.0,
        bf16_tflops=989.4,
        fp8_tflops=1978.9,
        memory_gbs=3350.0,
        link_gbs=450.0,
        network_gbs=50.0,
    ),
    Hardware(
        name="h200",
        product=r"NVIDIA H200",
        memory_gb=150.7,
        fp32_tflops=67.0,
        bf16_tflops=989.4,
        fp8_tflops=1978.9,
        memory_gbs=4800.0,
        link_gbs=450.0,
        network_gbs=50.0,
    ),
)
GPUS = {gpu.name: gpu for gpu in (A100, H100, H200)}
"""By the name that `glmv plan --gpu` takes."""


def find_hardware(gpu: str, file: Path | None = None, memory_gb: float | None = None) -> Hardware:
    """The hardware of a plan.

    Args:
        gpu: a name of `GPUS`.
        file: YAML with fields of `Hardware` that differ.
        memory_gb: device memory that differs.

    Raises:
        ConfigError: no such GPU, or a file that cannot be read or holds another key or an impossible number.
    """
    if gpu not in GPUS:
        raise ConfigError(
            f"--gpu: {gpu!r} is not known; there are {', '.join(GPUS)}, and --hardware FILE.yaml describes another"
        )
    tree = GPUS[gpu].model_dump()
    if file is not None:
        tree |= load_tree([file], [])
    if memory_gb is not None:
        tree["memory_gb"] = memory_gb
    return validate(Hardware, tree, where=str(file) if file is not None else "--memory-gb")


def known_device(device_name: str) -> Hardware | None:
    """A device by its product name; None where it is not in the table."""
    return next((gpu for gpu in GPUS.values() if gpu.product is not None and re.fullmatch(gpu.product, device_name)), None)


def device_peak(device_name: str, number_format: Literal["fp32", "bf16", "fp8"]) -> float | None:
    """Dense peak in operations a second of a device by its product name; None where it is not known."""
    gpu = known_device(device_name)
    tflops = getattr(gpu, f"{number_format}_tflops") if gpu is not None else None
    return tflops * 1e12 if tflops else None
