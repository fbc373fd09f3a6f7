"""`glmv-data stats`: what packed data sets hold, as histograms in one picture and as numbers in one JSON file.

Rows are counted all, from the shards' indexes. Documents are read from evenly spaced rows: a few thousand rows hold enough of
them, and reading a data set whole takes hours.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

from data_tools.inspect_rows import choose_rows
from megatron_glmv.config.model import ModelConfig
from megatron_glmv.data.shard_reader import ShardReader
from megatron_glmv.sequence.cost import cost_model

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

Floats = npt.NDArray[np.float64]

COLOURS = ("#2457c5", "#d97706", "#0f9d74", "#b42318", "#7a5af8", "#667085")
SHARES = {"trained": "#22965a", "masked text": "#98a2b3", "visual": "#6d94d6", "padding": "#e3e6ec"}
MODALITIES = ("text", "image", "images", "video", "mixed")
BINS = 48
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)

HELP = """\
Reads packed data sets and writes FOLDER/stats.png and FOLDER/stats.json: lengths of documents, tokens and patches of rows,
their fill, what the tokens are (trained, masked, visual, padding), how many documents show what, and how evenly rows cost."""


@dataclass(frozen=True)
class Counted:
    """What a data set holds.

    Attributes:
        name: of its folder.
        length: tokens of a row.
        num_rows: rows in it.
        num_samples: documents in it.
        fill: [rows] useful tokens over length, of every row.
        patches: [rows] of every row.
        lengths: [documents] tokens, of the documents that were read.
        costs: [rows read] over their mean.
        modalities: how many of the documents read show what.
        shares: of the tokens of all rows: trained, masked text, visual, padding; they sum to 1.
    """

    name: str
    length: int
    num_rows: int
    num_samples: int
    fill: Floats
    patches: Floats
    lengths: Floats
    costs: Floats
    modalities: dict[str, int]
    shares: dict[str, float]


def count_rows(folder: Path, num_read: int, model: str = "glm-4.1v-9b") -> Counted:
    """Count one data set.

    Args:
        folder: of `glmv-data pack`.
        num_read: rows whose documents are read, 0 for all.
        model: preset whose cost is meant.

    Raises:
        ShardError: no data set that can be read.
    """
    reader = ShardReader(folder)
    index = reader.index
    tables = list(reader.tables())
    tokens, patches, trained = (np.concatenate([table[name] for table in tables]) for name in ("tokens", "patches", "trained"))
    costs = cost_model(ModelConfig(preset=model).shape)
    lengths: list[int] = []
    row_costs: list[float] = []
    modalities: Counter[str] = Counter()
    for number in choose_rows(None, len(reader), num_read or len(reader)):
        row = reader.read(number, media=False)
        extra = 0.0
        for document, media in zip(row.documents, row.media, strict=True):
            own = [rows * columns for rows, columns in document.frames]
            squares = sum(count * count for count in own)
            extra += float(costs.extra([len(document.tokens)], [document.num_trained], [sum(own)], [squares])[0])
            lengths.append(len(document.tokens))
            modalities[_modality([item.kind for item in media])] += 1
        row_costs.append(index.length + extra)
    whole = index.num_rows * index.length
    visual = int(patches.sum()) // index.merge_size**2
    shares = {"trained": int(trained.sum()), "masked text": int(tokens.sum() - trained.sum()) - visual, "visual": visual,
              "padding": whole - int(tokens.sum())}  # fmt: skip
    return Counted(
        folder.name, index.length, index.num_rows, index.num_samples, tokens / index.length, patches.astype(np.float64),
        np.array(lengths, dtype=np.float64), np.array(row_costs) / np.mean(row_costs),
        {name: modalities[name] for name in MODALITIES}, {name: count / whole for name, count in shares.items()},
    )  # fmt: skip


def _modality(kinds: Sequence[str]) -> str:
    if not kinds:
        return "text"
    if "video" in kinds:
        return "video" if set(kinds) == {"video"} else "mixed"
    return "image" if len(kinds) == 1 else "images"


def describe(counted: Counted) -> dict[str, Any]:
    """The numbers of the picture: of each histogram its edges, counts and quantiles."""
    edges = {"fill": np.linspace(0, 1, BINS + 1), "patches": _edges(counted.patches), "lengths": _log_edges(counted.lengths),
             "costs": _edges(counted.costs)}  # fmt: skip
    histograms = {
        name: {
            "edges": [round(float(edge), 4) for edge in found],
            "counts": np.histogram(getattr(counted, name), found)[0].tolist(),
            "mean": round(float(getattr(counted, name).mean()), 4),
            "quantiles": {str(share): round(float(np.quantile(getattr(counted, name), share)), 4) for share in QUANTILES},
        }
        for name, found in edges.items()
    }
    return {"name": counted.name, "length": counted.length, "rows": counted.num_rows, "samples": counted.num_samples,
            "documents_read": len(counted.lengths), "shares": {name: round(share, 6) for name, share in counted.shares.items()},
            "modalities": counted.modalities, "histograms": histograms}  # fmt: skip


def _edges(values: Floats) -> Floats:
    low, high = float(values.min()), float(values.max())
    return np.linspace(low, high if high > low else low + 1, BINS + 1)


def _log_edges(values: Floats) -> Floats:
    return np.geomspace(max(1.0, values.min()), max(2.0, values.max()) * (1 + 1e-9), BINS + 1)


def draw(sets: Sequence[Counted], path: Path) -> None:
    """Write the picture: six panels, a colour a data set."""
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11,
                         "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.edgecolor": "#98a2b3"}):  # fmt: skip
        figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
        longest = max(float(counted.lengths.max()) for counted in sets)
        shortest = min(float(counted.lengths.min()) for counted in sets)
        most = max(float(counted.patches.max()) for counted in sets)
        emptiest = min(float(counted.fill.min()) for counted in sets)
        _histogram(axes[0, 0], sets, "lengths", _log_edges(np.array([shortest, longest])), "length of documents", "tokens")
        _histogram(
            axes[0, 1], sets, "fill", np.linspace(min(0.9, emptiest), 1, BINS + 1), "fill of rows", "useful tokens / row"
        )
        axes[0, 1].xaxis.set_major_formatter(PercentFormatter(1))
        _histogram(axes[0, 2], sets, "patches", np.linspace(0, max(1.0, most), BINS + 1), "patches of rows", "patches")
        farthest = max(0.05, *(float(np.abs(counted.costs - 1).max()) for counted in sets))
        cost_edges = np.linspace(1 - farthest, 1 + farthest, BINS + 1)
        _histogram(axes[1, 0], sets, "costs", cost_edges, "cost of rows", "cost / mean cost")
        _draw_shares(axes[1, 1], sets)
        _draw_modalities(axes[1, 2], sets)
        axes[0, 0].legend(frameon=False, loc="upper left")
        figure.savefig(path, dpi=110, format="png", pad_inches=0.2, bbox_inches="tight")
        plt.close(figure)


def _histogram(axis: Axes, sets: Sequence[Counted], name: str, edges: Floats, title: str, unit: str) -> None:
    for counted, colour in zip(sets, _colours(len(sets)), strict=True):
        values = getattr(counted, name)
        counts = np.histogram(values, edges)[0] / len(values)
        axis.stairs(counts, edges, color=colour, linewidth=1.4, fill=False, label=counted.name)
        axis.stairs(counts, edges, color=colour, alpha=0.15, fill=True)
        axis.axvline(float(np.median(values)), color=colour, linewidth=0.8, linestyle=":")
    if name == "lengths":
        axis.set_xscale("log")
    axis.set_title(f"{title}, median dotted")
    axis.set_xlabel(unit)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if name == "patches":
        axis.xaxis.set_major_locator(MaxNLocator(5))
    if name in ("lengths", "patches"):
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _draw_shares(axis: Axes, sets: Sequence[Counted]) -> None:
    start = np.zeros(len(sets))
    for name, colour in SHARES.items():
        shares = np.array([counted.shares[name] for counted in sets])
        axis.barh(range(len(sets)), shares, left=start, color=colour, height=0.55, label=name)
        for place, (share, left) in enumerate(zip(shares, start, strict=True)):
            if share >= 0.05:
                axis.text(left + share / 2, place, f"{share:.0%}", ha="center", va="center", fontsize=9)
        start += shares
    axis.set_yticks(range(len(sets)), [counted.name for counted in sets])
    axis.set_ylim(len(sets) - 0.4, -0.9)
    axis.set_title("what the tokens of rows are")
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.legend(frameon=False, ncols=4, loc="upper left", fontsize=9, handlelength=1)


def _draw_modalities(axis: Axes, sets: Sequence[Counted]) -> None:
    height = 0.8 / len(sets)
    for place, (counted, colour) in enumerate(zip(sets, _colours(len(sets)), strict=True)):
        shares = [counted.modalities[name] / max(1, len(counted.lengths)) for name in MODALITIES]
        where = np.arange(len(MODALITIES)) + (place - (len(sets) - 1) / 2) * height
        bars = axis.barh(where, shares, height=0.9 * height, color=colour, alpha=0.8)
        axis.bar_label(bars, [f"{share:.1%}" for share in shares], padding=3, fontsize=9)
    axis.set_yticks(range(len(MODALITIES)), ["text only", "one image", "several images", "video", "images and video"])
    axis.invert_yaxis()
    axis.set_title("what documents show")
    axis.margins(x=0.15)
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _colours(count: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(count)]


def write_stats(folders: Sequence[Path], out: Path, num_read: int = 2000, model: str = "glm-4.1v-9b") -> dict[str, Any]:
    """Count data sets and write stats.json and stats.png into `out`.

    Raises:
        ShardError: a folder that is no data set.
        OSError: a file cannot be written.
    """
    started = time.monotonic()
    sets = [count_rows(folder, num_read, model) for folder in folders]
    out.mkdir(parents=True, exist_ok=True)
    described = [describe(counted) for counted in sets]
    report = {"tool": "stats", "sets": described, "rows_read": num_read, "model": model}
    for name, write in (("stats.json", lambda path: path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")),
                        ("stats.png", lambda path: draw(sets, path))):  # fmt: skip
        partial = out / f".{os.getpid()}.{name}"
        write(partial)
        partial.rename(out / name)
    summary = [{key: entry[key] for key in ("name", "rows", "samples", "shares", "modalities")} for entry in described]
    return {"tool": "stats", "out": str(out), "sets": summary, "seconds": round(time.monotonic() - started, 1)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glmv-data stats`."""
    parser.description = HELP
    parser.add_argument("datasets", type=Path, nargs="+", metavar="DATASET", help="folders of `glmv-data pack`")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="gets stats.png and stats.json")
    parser.add_argument("--rows", type=int, default=2000, metavar="N",
                        help="rows whose documents are read, 0 for all (default %(default)s)")  # fmt: skip
    parser.add_argument("--model", default="glm-4.1v-9b", metavar="PRESET", help="whose cost is meant (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Run the tool and print its report."""
    print(json.dumps(write_stats(args.datasets, args.out, args.rows, args.model)))
