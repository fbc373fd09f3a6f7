"""Where the numbers of a run go: metrics.jsonl, TensorBoard, and lines on the terminal.

A resumed run cuts off what the killed one had recorded beyond its checkpoint, so that curves have each step once.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from megatron_glmv.config.base import InputError, read_yaml
from megatron_glmv.config.training import MetricsConfig, WandbConfig
from megatron_glmv.run_folder.metrics_file import METRICS_FILE, rewind
from megatron_glmv.training.checkpoint_files import SaveReport
from megatron_glmv.training.observation import Histogram, Observation
from megatron_glmv.training.progress import ProgressLine


class Recorder:
    """Records one run; create it on one rank.

    Args:
        run_folder: gets metrics.jsonl and tensorboard/.
        config: whether it gets the latter, and whether Weights & Biases does.
        first_step: steps already done; what metrics.jsonl holds beyond them is cut off.
        stream: where lines go; None: stderr.
    """

    def __init__(self, run_folder: Path, config: MetricsConfig, first_step: int = 0, stream: TextIO | None = None) -> None:
        self.path, self._folder = run_folder / METRICS_FILE, run_folder
        self._line = ProgressLine(stream)
        run_folder.mkdir(parents=True, exist_ok=True)
        rewind(self.path, first_step)
        self._file = self.path.open("a", encoding="utf-8")
        # It follows TensorBoard's writer from here on, and so must be there first.
        self._wandb = _open_wandb(run_folder, config.wandb) if config.wandb is not None else None
        self._board = _open_board(run_folder / "tensorboard", first_step) if config.tensorboard else None

    def write(self, record: Mapping[str, Any], kind: str) -> None:
        """Record numbers, and trees of numbers, of record["step"]; TensorBoard shows them as kind/key."""
        self._file.write(json.dumps({key: _plain(value) for key, value in record.items()}) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in _scalars(record):
                self._board.add_scalar(f"{kind}/{key}", value, int(record["step"]))

    def observe(self, step: int, observation: Observation) -> None:
        """Record a closer look at a step; histograms go to TensorBoard only."""
        self.write({"step": step, "observed": observation.numbers}, "train")
        if self._board is not None:
            for name, histogram in observation.histograms.items():
                _add_histogram(self._board, name, histogram, step)

    def expect(self, first_step: int, last_step: int, numbers: Mapping[str, Any], kind: str) -> None:
        """Record what is expected of these steps; TensorBoard draws it as a run of its own over the measured curves."""
        self._file.write(json.dumps({"step": first_step, "planned": _plain(numbers)}) + "\n")
        if self._board is not None:
            with _open_board(self._folder / "tensorboard" / "planned", first_step) as board:
                for key, value in _scalars(numbers):
                    for step in (first_step, last_step):
                        board.add_scalar(f"{kind}/{key}", value, step)

    def show(self, text: str, *, important: bool = False) -> None:
        """Show how far the run is, over the line before."""
        self._line.show(text, important=important)

    def note(self, text: str) -> None:
        """Print a line that stays: a checkpoint written, a sample that did not decode."""
        self._line.note(text)

    def go_back(self, step: int) -> None:
        """Drop what was recorded after `step`: the run has returned to a checkpoint. Weights & Biases keeps it."""
        self._file.close()
        rewind(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")
        if self._board is not None:
            self._board.close()
            self._board = _open_board(self._folder / "tensorboard", step)

    def close(self) -> None:
        """Flush everything."""
        self._line.close()
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def record_save(recorder: Recorder, save: SaveReport, kind: str) -> None:
    """Record what a checkpoint or a local copy cost that has become complete, and say it of a checkpoint."""
    if save.is_copy:
        recorder.write({"step": save.step, "local_copy": {"stall_s": save.stall_s}}, kind)
        return
    recorder.write({"step": save.step, "checkpoint": {"stall_s": save.stall_s, "seconds": save.seconds}}, kind)
    stall = f"training stood still for {save.stall_s:.2f} of its {save.seconds:.2f} s"
    recorder.note(f"checkpoint of step {save.step} complete; {stall}")


def _open_board(folder: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None, flush_secs=10)


def _add_histogram(board: Any, name: str, histogram: Histogram, step: int) -> None:
    """A histogram whose values are taken to lie in the middle of their bins."""
    counts, edges = histogram.counts, histogram.edges
    lower = [edges[0] * (2.0 if edges[0] < 0 else 0.5), *edges[:-1]]
    middles = [(low + high) / 2 for low, high in zip(lower, edges, strict=True)]
    board.add_histogram_raw(
        name,
        min=lower[0],
        max=edges[-1],
        num=sum(counts),
        sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
        sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
        bucket_limits=edges,
        bucket_counts=counts,
        global_step=step,
    )


def _open_wandb(run_folder: Path, config: WandbConfig) -> Any:
    """A run on Weights & Biases, the same one after a resume, that follows the files of TensorBoard.

    Raises:
        InputError: the package is missing, or its server refuses.
    """
    try:
        import wandb
    except ImportError:
        raise InputError("metrics.wandb: the package is not installed; run `pip install wandb`, or set it to null") from None
    known = run_folder / "wandb_id"
    if not known.is_file():
        known.write_text(uuid.uuid4().hex, encoding="utf-8")
    try:
        return wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name or run_folder.resolve().name,
            id=known.read_text(encoding="utf-8").strip(),
            resume="allow" if config.mode == "online" else None,
            mode=config.mode,
            dir=str(run_folder),
            sync_tensorboard=True,
            config=read_yaml(run_folder / "config.yaml") if (run_folder / "config.yaml").is_file() else None,
        )
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"metrics.wandb: {reason}; log in with `wandb login`, or set metrics.wandb.mode=offline") from None


def _plain(value: Any) -> Any:
    """A value that JSON can hold: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif key != "step" and math.isfinite(value):
            yield prefix + key, value
