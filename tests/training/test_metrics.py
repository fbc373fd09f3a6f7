"""What is written, what a person reads, and what a resumed run does with the reports of the killed one."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_glmv.config.training import MetricsConfig
from megatron_glmv.run_folder.figures import format_count, format_duration, format_rate
from megatron_glmv.run_folder.metrics_file import read_metrics
from megatron_glmv.training.metrics import MetricsWriter, StepMetrics, draw_loss
from megatron_glmv.training.progress import ProgressLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def metrics(step: int, **changes: Any) -> StepMetrics:
    fields: dict[str, Any] = {
        "step": step,
        "loss": 2.0,
        "learning_rates": {"vision": 2e-5, "merger": 1e-4, "text": 1e-4},
        "grad_norm": 0.5,
        "applied": True,
        "trained_tokens": 100,
        "useful_tokens": 900,
        "total_tokens": 1000,
        "images": 6,
        "seconds": 0.5,
        "loader_wait_s": 0.01,
        "flops": {"text": 3e12, "vision": 1e12},
    }
    return StepMetrics(**(fields | changes))


def writer(folder: Path, stream: io.StringIO, **changes: Any) -> MetricsWriter:
    config = MetricsConfig(every_steps=changes.pop("every_steps", 1), tensorboard=changes.pop("tensorboard", False))
    settings: dict[str, Any] = {"num_ranks": 4, "peak_tflops": 10.0} | changes
    return MetricsWriter(folder, config, settings.pop("total_steps", 10), stream=stream, **settings)


def records(folder: Path) -> list[dict[str, Any]]:
    return list(read_metrics(folder / "metrics.jsonl"))


def test_one_step_as_a_record(tmp_path: Path) -> None:
    """The arithmetic by hand: 4e12 operations in 0.5 s on 4 ranks are 2 TFLOP/s each, a fifth of a peak of 10."""
    reporter = writer(tmp_path, io.StringIO())
    reporter.log_step(metrics(4))
    reporter.close()
    (record,) = records(tmp_path)
    expected = {
        "step": 4, "loss": 2.0, "grad_norm": 0.5, "tokens_per_s": 1800.0, "images_per_s": 12.0, "useful_share": 0.9,
        "step_s": 0.5, "loader_wait_s": 0.01, "skipped_steps": 0, "bad_samples": 0, "tflops_per_rank": 2.0, "mfu": 0.2,
        "eta_s": 3.0, "trained_tokens": 100,
    }  # fmt: skip
    assert {key: record[key] for key in expected} == pytest.approx(expected)
    assert record["lr"] == {"vision": 2e-5, "merger": 1e-4, "text": 1e-4}
    assert record["mfu_by_tower"] == pytest.approx({"text": 0.15, "vision": 0.05})


def test_an_interval_weighs_losses_by_tokens_and_leaves_skipped_steps_out(tmp_path: Path) -> None:
    reporter = writer(tmp_path, io.StringIO(), every_steps=3)
    reporter.log_step(metrics(1, loss=1.0, trained_tokens=300))
    reporter.log_step(metrics(2, loss=5.0, trained_tokens=100, seconds=1.5))
    assert records(tmp_path) == []
    reporter.log_step(metrics(3, loss=math.nan, grad_norm=math.inf, applied=False, skipped_steps=1))
    reporter.close()
    (record,) = records(tmp_path)
    assert record["loss"] == pytest.approx(2.0)
    assert record["tokens_per_s"] == pytest.approx(2700 / 2.5)
    assert (record["grad_norm"], record["skipped_steps"]) == (None, 1)


def test_a_skipped_step_is_reported_at_once(tmp_path: Path) -> None:
    stream = io.StringIO()
    reporter = writer(tmp_path, stream, every_steps=100, total_steps=1000)
    reporter.log_step(metrics(1, loss=math.nan, grad_norm=math.nan, applied=False, skipped_steps=1))
    reporter.close()
    assert "step 1/1000 | step skipped" in stream.getvalue() and "1 skipped" in stream.getvalue()
    assert records(tmp_path)[0]["loss"] is None


def test_the_line_that_a_person_reads(tmp_path: Path) -> None:
    stream = io.StringIO()
    reporter = writer(tmp_path, stream, total_steps=2000)
    reporter.log_step(metrics(120, useful_tokens=6150, total_tokens=6600, bad_samples=2, loader_wait_s=0.2))
    assert stream.getvalue() == (
        "step 120/2000 | loss 2.0000 | lr 1e-4 (vision 2e-5, merger 1e-4) | grad 0.50 | 12.3k tok/s | 12 img/s | 93% useful | "
        "2.00 TFLOP/s (MFU 20.0%) | 0.50 s/step | waits 0.20 s for rows | 2 bad samples | 15:40 left\n"
    )
    reporter.close()


def test_without_a_peak_there_is_no_mfu(tmp_path: Path) -> None:
    stream = io.StringIO()
    reporter = writer(tmp_path, stream, peak_tflops=None)
    reporter.log_step(metrics(1, learning_rates={"vision": 0.0, "merger": 0.0, "text": 0.0}))
    reporter.close()
    assert "MFU" not in stream.getvalue() and "lr 0 |" in stream.getvalue()
    assert "mfu" not in records(tmp_path)[0]


def test_a_terminal_line_renews_itself_and_notes_stay() -> None:
    stream = Terminal()
    line = ProgressLine(stream)
    line.show("one")
    line.show("two")
    line.note("a checkpoint")
    line.show("three")
    line.close()
    line.close()
    assert stream.getvalue() == "\r\x1b[2Kone\r\x1b[2Ktwo\r\x1b[2Ka checkpoint\n\r\x1b[2Kthree\n"


def test_a_file_gets_a_line_now_and_then() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream, interval_s=1000)
    for text in ("first", "second", "third"):
        line.show(text)
    line.show("last", important=True)
    line.note("note")
    line.close()
    assert stream.getvalue() == "first\nlast\nnote\n"


def test_a_resumed_run_continues_its_curve(tmp_path: Path) -> None:
    first = writer(tmp_path, io.StringIO())
    for step in range(1, 6):
        first.log_step(metrics(step, loss=float(step)))
    first.log_evaluation(4, 1.5, 1000)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    second = writer(tmp_path, io.StringIO(), first_step=3)
    second.log_step(metrics(4, loss=40.0))
    second.close()
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_tensorboard_has_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = writer(tmp_path, io.StringIO(), tensorboard=True)
    reporter.log_step(metrics(1))
    reporter.log_step(metrics(2, loss=1.0, grad_norm=math.nan, applied=False))
    reporter.log_evaluation(2, 1.25, 64)
    reporter.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert {"train/loss", "train/lr/text", "train/mfu_by_tower/vision", "train/tokens_per_s", "eval/eval_loss"} <= set(
        board.Tags()["scalars"]
    )
    assert [(event.step, event.value) for event in board.Scalars("train/grad_norm")] == [(1, 0.5)]
    assert [event.value for event in board.Scalars("eval/eval_loss")] == [1.25]


def test_draw_loss(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 10.0 / step} for step in range(1, 50)]
    lines += [{"step": 50, "loss": None}, {"step": 40, "eval_loss": 1.0}]  # type: ignore[dict-item]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_loss(tmp_path / "metrics.jsonl", tmp_path / "out" / "loss.png")
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl: no loss to draw"):
        draw_loss(tmp_path / "empty.jsonl", tmp_path / "none.png")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (7.5, "7.50"), (999, "999"), (1234, "1.23k"), (12345, "12.3k"), (999_900, "1.00M"), (4.56e9, "4.56G"),
     (0.5, "0.50"), (99.96, "100"), (123456, "123k")],
)  # fmt: skip
def test_format_count(value: float, text: str) -> None:
    assert format_count(value) == text


def test_format_count_with_a_unit() -> None:
    assert (format_count(2.1e9, "FLOP/s"), format_count(12, "FLOP/s")) == ("2.10 GFLOP/s", "12 FLOP/s")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (42, "0:42"), (725, "12:05"), (11045, "3:04:05"), (183_840, "2 d 03:04"), (59.7, "1:00"), (-3, "0:00"),
     (math.inf, "?"), (math.nan, "?")],
)  # fmt: skip
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("rate", "text"), [(0.0, "0"), (1e-4, "1e-4"), (2.345e-5, "2.35e-5"), (0.5, "5e-1"), (1.0, "1e0")])
def test_format_rate(rate: float, text: str) -> None:
    assert format_rate(rate) == text
