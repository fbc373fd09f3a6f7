"""One rank of a training run that runs steps when it is asked: the parts of `glmv train`, without checkpoints and metrics."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from digits_model import run_config
from operations import Recorder, volume
from safetensors.torch import save_file
from sides import answer

from megatron_glmv.config.training import TrainConfig
from megatron_glmv.convert.hf_export import gather_hf_tensors
from megatron_glmv.parallel import groups
from megatron_glmv.plan.flops import training_flops
from megatron_glmv.sequence.packed import PackedSequence
from megatron_glmv.training.assemble import assemble, assemble_model
from megatron_glmv.training.loop import open_stream
from megatron_glmv.training.step import StepResult, train_step

PROBE_BYTES, PROBES = 1 << 24, 8
"""Size and number of the exchanges that measure what one byte and one message cost here."""


class Loop:
    """A model, its optimizer and its rows."""

    def __init__(self, config: TrainConfig, num_decoded: int = 0) -> None:
        """Build everything; process groups are made here. The rows of so many steps are read and decoded at once."""
        groups.initialize(config.parallel, config.seed)
        self.config = config
        self.assembly = assemble(config, assemble_model(config))
        self.stream = open_stream(config, held_out=False)
        self.decoded = [self.stream.step(step) for step in range(num_decoded)]
        self.done = 0

    def step(self) -> StepResult:
        """Wait for rows, unless they are decoded, forward, backward, update: an ordinary step."""
        self.last = self.decoded[self.done] if self.done < len(self.decoded) else self.stream.step(self.done)
        result = train_step(self.assembly, self.last, self.done)
        self.done += 1
        return result

    def steps(self, count: int) -> dict[str, Any]:
        """Run and time some steps."""
        seconds, results = [], []
        for _ in range(count):
            dist.barrier()
            started = time.perf_counter()
            results.append(self.step())
            seconds.append(time.perf_counter() - started)
        return {
            "seconds": seconds,
            "tokens": [result.counts.useful_tokens for result in results],
            "losses": [result.loss for result in results],
            "flops": [sum(result.counts.flops.values()) for result in results],
            "towers": results[-1].counts.flops,
            "wait_s": self.stream.wait_s,
        }

    def operations(self) -> float:
        """Of the decoder in the last step where every token goes on to its end; of this rank's rows."""
        shape, rows = self.config.model.shape, self.last.rows
        return sum(flops.text + flops.head for flops in (training_flops(shape, _lengths(row), []) for row in rows))

    def weights(self, path: str) -> int:
        """Write the weights under Hugging Face names; returns their number of values."""
        found = {name: tensor.contiguous() for name, tensor in gather_hf_tensors(self.assembly.models, self.config.model.shape)}
        if dist.get_rank() == 0:
            save_file(found, path)
        return sum(tensor.numel() for tensor in found.values())

    def exchanges(self) -> dict[str, float]:
        """What this rank exchanges in one step, and what a message and a byte cost by themselves."""
        with Recorder() as recorder:
            self.step()
        messages, num_bytes = volume(recorder.exchanges)
        return {"messages": messages, "bytes": num_bytes, **probe()}

    def close(self) -> None:
        """End the threads and the groups."""
        self.stream.close()
        groups.destroy()


def _lengths(row: PackedSequence) -> list[int]:
    return [end - start for _, start, end in row.documents]


def probe() -> dict[str, float]:
    """Seconds of an all-reduce of one value, and of each further byte."""
    if dist.get_world_size() == 1:
        return {"message_s": 0.0, "byte_s": 0.0}
    times = []
    for size in (1, PROBE_BYTES // 4):
        value, found = torch.ones(size), []
        for _ in range(PROBES):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(value)
            found.append(time.perf_counter() - started)
        times.append(sorted(found)[PROBES // 2])
    return {"message_s": times[0], "byte_s": max(0.0, times[1] - times[0]) / PROBE_BYTES}


def main() -> None:
    """Build the run and answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size")
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--batch", type=int, required=True, help="rows of a step, over all replicas")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--decoded", type=int, default=0, help="steps whose rows are decoded before the clock runs")
    arguments = parser.parse_args()
    layout = {"tensor": arguments.tensor, "pipeline": arguments.pipeline}
    config = run_config(arguments.size, arguments.folder, arguments.rows, arguments.batch, timeout_s=1800, **layout)
    loop = Loop(config, arguments.decoded)
    try:
        answer({name: getattr(loop, name) for name in ("steps", "operations", "weights", "exchanges")})
    finally:
        loop.close()


if __name__ == "__main__":
    main()
