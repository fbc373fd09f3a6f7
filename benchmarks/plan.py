"""How far `glmv plan` is from what runs: bytes kept for the backward pass, and ratios of step times, on two CPU ranks.

    python benchmarks/plan.py [--rounds 5] [--rows 4]

The planner gets this machine as hardware: products, attention, memory and messages are timed first, one thread a rank, and all
efficiencies are 1. Then steps of a small model are timed in several layouts, densities of pictures and recomputations, and
compared as ratios to the first line, for what a CPU does in a second says nothing of a GPU. A round goes through all of them,
and ratios are medians over rounds: a machine that slows down slows all lines. Bytes are compared as they are.
State (weights, gradients, optimizer) is exact and not in the table: tests/plan/test_weights.py holds it to every byte.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sides import free_port

from megatron_glmv.config.base import validate
from megatron_glmv.config.model import PRESETS, ModelShape
from megatron_glmv.config.training import TrainConfig
from megatron_glmv.parallel import groups
from megatron_glmv.plan.activations import most_going_on, row_bytes
from megatron_glmv.plan.devices import Hardware
from megatron_glmv.plan.estimate import estimate
from megatron_glmv.plan.rows import RowSample
from megatron_glmv.sequence.packed import Document, PackedSequence, pack
from megatron_glmv.training.assemble import Assembly, assemble, assemble_model
from megatron_glmv.training.optimizer import step_optimizer
from megatron_glmv.training.step import chunk_inputs, run_schedule

LENGTH, SIDE = 512, 8
DOCUMENTS = (112, 120, 136, 144)
"""Tokens of the documents of every row."""
STEPS = 2
"""Timed steps of a case in a round, after one that is not."""
Case = tuple[str, int, float, dict[str, Any]]
CASES: tuple[Case, ...] = (
    ("data 2", 8, 1.0, {}),
    ("data 2, text only", 0, 1.0, {}),
    ("data 2, three times the pictures", 24, 1.0, {}),
    ("data 2, a fifth of the tokens trained", 8, 0.2, {}),
    ("data 2, full recompute", 8, 1.0, {"recompute": {"text": "full", "vision": "full"}}),
    ("data 2, frozen tower and merger", 8, 1.0, {"model": {"freeze": ["vision", "merger"]}}),
    ("tensor 2", 8, 1.0, {"parallel": {"tensor": 2}}),
    ("context 2", 8, 1.0, {"parallel": {"context": 2}}),
    ("pipeline 2, 4 + 4 layers", 24, 1.0, {"parallel": {"pipeline": 2}}),
    ("pipeline 2, 2 + 6 layers", 24, 1.0, {"parallel": {"pipeline": 2, "first_stage_layers": 2}}),
    ("pipeline 2, 0 + 8 layers", 24, 1.0, {"parallel": {"pipeline": 2, "first_stage_layers": 0}}),
)
"""Name, pictures of a row, trained share of its tokens, changes of the configuration."""


def write_architecture(folder: Path) -> None:
    """A model whose products are large enough to count, written: both towers of the quickstart's, wider and deeper."""
    tree = json.loads((PRESETS / "digits.json").read_text(encoding="utf-8"))
    tree["text_config"] |= {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
                            "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip
    tree["text_config"]["rope_parameters"] |= {"partial_rotary_factor": 0.5, "mrope_section": [4, 6, 6]}
    tree["vision_config"] |= {"hidden_size": 256, "depth": 6, "num_heads": 4, "out_hidden_size": 512, "intermediate_size": 1024}
    (folder / "config.json").write_text(json.dumps(tree))


def make_row(shape: ModelShape, pictures: int, share: float, seed: int) -> PackedSequence:
    """Four documents, the pictures dealt to them, so much of the end of each one trained."""
    random, tokens = np.random.default_rng(seed), shape.tokens
    documents = []
    for number, length in enumerate(DOCUMENTS):
        own = pictures // 4 + (number < pictures % 4)
        visual = [t for _ in range(own) for t in (tokens.image_start, *[tokens.image] * (SIDE**2 // 4), tokens.image_end)]
        words = random.integers(100, 300, length - len(visual))
        ids = np.concatenate((np.array(visual, dtype=np.int64), words))
        weights = (np.arange(length) >= length - round(share * length)).astype(np.float32)
        documents.append(Document(ids, weights, ((SIDE, SIDE),) * own, str(number)))
    size = (pictures * SIDE**2, shape.vision.patch_dim)
    patches = torch.from_numpy(random.integers(0, 256, size, dtype=np.uint8)) if pictures else None
    return pack(documents, LENGTH, image_token=tokens.image, pad_token=tokens.pad, align=8, patches=patches, key=str(seed))


def config_of(folder: Path, rows: int, changes: dict[str, Any]) -> TrainConfig:
    """One case's configuration: fp32 and no overlap, which threads of one core cannot give."""
    return validate(TrainConfig, {
        "run_folder": folder, "steps": 1, "global_batch_rows": rows, "optimizer": {"lr": 0.0},
        "model": {"hf_folder": folder, "load_weights": False, **changes.get("model", {})},
        "parallel": {"overlap": False, **changes.get("parallel", {})}, "precision": {"dtype": "fp32", "layers": "torch"},
        "recompute": changes.get("recompute", {}),
        "data": {"sequence_length": LENGTH, "sources": [{"name": "none", "path": "unused"}]},
    })  # fmt: skip


def measure_hardware() -> Hardware:
    """This machine as the planner sees GPUs: one rank, while the other one works, too."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    products = 2 * 1024**3 / _seconds(lambda: a @ b)
    query = torch.randn(4, 8, LENGTH // 4, 64)
    pairs = 4 * 8 * 64 * 4 * (LENGTH // 4) * (LENGTH // 4 + 1) // 2
    attention = pairs / _seconds(lambda: F.scaled_dot_product_attention(query, query, query, is_causal=True))
    large, other = torch.randn(1 << 22), torch.randn(1 << 22)
    memory = 3 * large.nbytes / _seconds(lambda: torch.add(large, other, out=large))
    message, small = torch.zeros(1 << 20), torch.zeros(1)
    link = message.nbytes / _seconds(lambda: dist.all_reduce(message))  # two ranks send each other all of it once
    latency = _seconds(lambda: dist.all_reduce(small))
    found = torch.tensor([products, attention, memory, link, latency], dtype=torch.float64)
    dist.all_reduce(found)
    products, attention, memory, link, latency = (found / dist.get_world_size()).tolist()
    return Hardware(
        name="cpu", memory_gb=1000, fp32_tflops=products / 1e12, bf16_tflops=products / 1e12, memory_gbs=memory / 1e9,
        link_gbs=link / 1e9, network_gbs=link / 1e9, matmul_efficiency=1, attention_efficiency=min(1.0, attention / products),
        memory_efficiency=1, link_efficiency=1, network_efficiency=1, latency_us=latency * 1e6, overlap=0,
    )  # fmt: skip


def _seconds(call: Callable[[], Any], rounds: int = 7) -> float:
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


class _Kept:
    """A tensor that autograd has put away."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def run_case(config: TrainConfig, rows: list[PackedSequence]) -> tuple[float, float, int]:
    """Seconds of a step, the busiest rank's computing seconds in it, and bytes that a row keeps."""
    groups.initialize(config.parallel, seed=1)
    assembly = assemble(config, assemble_model(config))
    share = len(rows) // groups.data_size()
    own = rows[groups.data_rank() * share :][:share]
    for chunk in assembly.chunks:
        chunk.train()
    kept = _kept_by_a_row(assembly, own[0]) if config.parallel.pipeline == 1 else 0
    _step(assembly, own)
    seconds = computing = 0.0
    for _ in range(STEPS):
        dist.barrier()
        started, began = time.perf_counter(), time.process_time()
        _step(assembly, own)
        computing += (time.process_time() - began) / STEPS
        dist.barrier()
        seconds += (time.perf_counter() - started) / STEPS
    busiest = torch.tensor(computing)
    dist.all_reduce(busiest, op=dist.ReduceOp.MAX)
    return seconds, float(busiest), kept


def _step(assembly: Assembly, rows: list[PackedSequence]) -> None:
    for chunk in assembly.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    assembly.optimizer.zero_grad()
    run_schedule(assembly, rows, forward_only=False)
    step_optimizer(assembly.optimizer)


def _kept_by_a_row(assembly: Assembly, row: PackedSequence) -> int:
    """Bytes of all storages that autograd keeps of one row's forward pass, but those of weights; one stage."""
    model, kept = assembly.chunks[0], weakref.WeakSet[_Kept]()
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.module.parameters()}

    def put_away(tensor: torch.Tensor) -> _Kept:
        holder = _Kept(tensor)
        kept.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(put_away, lambda holder: holder.tensor):
        losses = model(chunk_inputs(assembly.config, row, model.module))
    gc.collect()
    storages = {holder.tensor.untyped_storage().data_ptr(): holder.tensor.untyped_storage().nbytes() for holder in kept}
    del losses
    return sum(size for place, size in storages.items() if place not in owned)


def predict(config: TrainConfig, hardware: Hardware, pictures: int, trained: int) -> tuple[float, float, float]:
    """Seconds of a step, of them the busiest stage's, and bytes that a row keeps on one stage."""
    patches = float(pictures * SIDE**2)
    rows = RowSample(
        tokens=np.array([float(LENGTH)]),
        patches=np.array([patches]),
        trained=np.array([float(trained)]),
        document_tokens=LENGTH / 4,
        frame_patches=float(SIDE**2),
        origin="made",
    )
    plan = estimate(config, dist.get_world_size(), hardware, rows)
    row = row_bytes(config, patches, "torch", most_going_on(config, trained))
    layers = (config.model.shape.text.num_layers - 1) * row.text + row.last
    kept = row.vision + row.merger + row.entry[0] + layers + row.head
    return plan.step_s, max(plan.timeline.busy) + plan.optimizer_s, kept


def run_round(num_rows: int, folder: Path) -> dict[str, Any]:
    """What two ranks find of this machine and of every case, each in processes of their own: every model leaves them slower."""
    write_architecture(folder)
    hardware = in_ranks(_measure, num_rows, folder)
    found = [in_ranks(_work, case, num_rows, hardware, folder) for case in CASES]
    return {"hardware": hardware, "measured": [measured for measured, _ in found], "planned": [planned for _, planned in found]}


def in_ranks(call: Callable[..., Any], *arguments: Any) -> Any:
    """What `call` returns on the first of two ranks, forked from here.

    Raises:
        RuntimeError: a rank failed; it has said why on standard error.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    port = free_port()
    ranks = [context.Process(target=_as_rank, args=(rank, port, sender, call, arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("a rank failed") from None
    finally:
        for rank in ranks:
            rank.join()


def _as_rank(rank: int, port: int, sender: Connection, call: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    found = call(*arguments)
    groups.destroy()
    if not rank:
        sender.send(found)


def _measure(num_rows: int, folder: Path) -> Hardware:
    groups.initialize(config_of(folder, num_rows, {}).parallel, seed=1)
    return measure_hardware()


def _work(case: Case, num_rows: int, hardware: Hardware, folder: Path) -> tuple[Any, Any]:
    _, pictures, share, changes = case
    config = config_of(folder, num_rows, changes)
    rows = [make_row(config.model.shape, pictures, share, seed) for seed in range(num_rows)]
    return run_case(config, rows), predict(config, hardware, pictures, rows[0].num_trained)


def print_table(rounds: list[dict[str, Any]]) -> None:
    """Medians over the rounds of the ratios to the first line, and the bytes."""
    measured, planned = (
        np.median([np.divide(lines, [*lines[0][:2], 1]) for lines in (found[name] for found in rounds)], axis=0)
        for name in ("measured", "planned")
    )
    print("| case | MB a row keeps | planned | computing of the busiest rank | planned | seconds of a step | planned |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, *_), (step, busy, kept), (plan_step, plan_busy, plan_kept) in zip(CASES, measured, planned, strict=True):
        shown = f"{kept / 1e6:.1f} | {plan_kept / kept - 1:+.1%}" if kept else "| "
        print(f"| {name} | {shown} | x {busy:.2f} | x {plan_busy:.2f} ({plan_busy / busy - 1:+.0%}) | "
              f"x {step:.2f} | x {plan_step:.2f} ({plan_step / step - 1:+.0%}) |")  # fmt: skip


def main() -> None:
    """Go through the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="of a step, over both ranks")
    parser.add_argument("--rounds", type=int, default=5, help="times through all cases")
    arguments = parser.parse_args()
    rounds = []
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(run_round(arguments.rows, Path(folder)))
        hardware = rounds[-1]["hardware"]
        rates = f"{hardware.fp32_tflops * 1e3:.0f} GFLOPS, attention {hardware.attention_efficiency:.2f} of it"
        rates = f"{rates}, memory {hardware.memory_gbs:.1f} GB/s, messages {hardware.link_gbs:.2f} GB/s"
        print(f"round {number + 1} of {arguments.rounds}, one rank: {rates}", flush=True)
    print()
    print_table(rounds)


if __name__ == "__main__":
    main()
