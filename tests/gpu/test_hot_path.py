"""Between two rows the processor never waits for the device: copies, sizes and boundaries are prepared without reading it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_glmv.training.step import _forward_step
from tests.gpu import runs
from tests.model.layouts import make_rows
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def run_rows(rank: int, folder: str, fields: dict[str, Any], rows_kind: str) -> int:
    """Forward and backward passes of some rows, the second time with torch refusing every wait; returns how many rows ran."""
    assembly = runs.build(runs.config(folder, **fields))
    [chunk] = assembly.chunks
    rows = make_rows(runs.SHAPE) if rows_kind == "pictures" else runs.language_rows(0, 4, 256)
    if runs.on_gpu():
        # As the loader hands them over.
        rows = [runs.with_patches(row, torch.Tensor.pin_memory) for row in rows]
    done = 0
    for strict in (False, True):
        if strict and runs.on_gpu():
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        iterator = iter(rows)
        for _ in rows:
            output, loss_of = _forward_step(assembly.config, iterator, chunk)
            loss_of(output)[0].backward()
            done += 1
    if runs.on_gpu():
        torch.cuda.set_sync_debug_mode("default")
    return done


@pytest.mark.parametrize("fields", [{}, {"fp8_text": "current", "fp8_vision": "current"}], ids=["bf16", "fp8"])
@pytest.mark.parametrize("rows_kind", ["pictures", "language"])
def test_no_wait_within_a_micro_batch(fields: dict[str, Any], rows_kind: str, tmp_path: Any) -> None:
    settings = {"dtype": "bf16", "layers": "te", **fields}
    assert run_ranks(run_rows, 1, str(tmp_path), settings, rows_kind, timeout_s=300.0)[0] == 8
