"""Where the numbers of a run go: metrics.jsonl, TensorBoard, and lines on the terminal.

A resumed run cuts off what the killed one had recorded beyond its checkpoint, so that curves have each step once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from megatron_glmv.training.progress import ProgressLine

METRICS_FILE = "metrics.jsonl"


class Recorder:
    """Records one run; create it on one rank.

    Args:
        run_folder: gets metrics.jsonl and tensorboard/.
        tensorboard: whether it gets the latter.
        first_step: steps already done; what metrics.jsonl holds beyond them is cut off.
        stream: where lines go; None: stderr.
    """

    def __init__(self, run_folder: Path, *, tensorboard: bool, first_step: int = 0, stream: TextIO | None = None) -> None:
        self.path = run_folder / METRICS_FILE
        self._line = ProgressLine(stream)
        run_folder.mkdir(parents=True, exist_ok=True)
        rewind(self.path, first_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _open_board(run_folder / "tensorboard", first_step) if tensorboard else None

    def write(self, record: Mapping[str, Any], kind: str) -> None:
        """Record numbers, and trees of numbers, of record["step"]; TensorBoard shows them as kind/key."""
        self._file.write(json.dumps({key: _plain(value) for key, value in record.items()}) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in _scalars(record):
                self._board.add_scalar(f"{kind}/{key}", value, int(record["step"]))

    def show(self, text: str, *, important: bool = False) -> None:
        """Show how far the run is, over the line before."""
        self._line.show(text, important=important)

    def note(self, text: str) -> None:
        """Print a line that stays: a checkpoint written, a sample that did not decode."""
        self._line.note(text)

    def close(self) -> None:
        """Flush everything."""
        self._line.close()
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a metrics.jsonl in order; a line that a killed run left unfinished is passed over."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def rewind(path: Path, step: int) -> None:
    """Drop the records after `step`, and unfinished lines."""
    if not path.is_file():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    temporary.replace(path)


def _open_board(folder: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None, flush_secs=10)


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
