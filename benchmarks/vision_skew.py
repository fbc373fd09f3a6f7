"""How much longer the slowest rank works than the mean one, on rows with 0 to 40 images: rows in order, and dealt by cost.

    python benchmarks/vision_skew.py [--preset glm-4.1v-9b] [--length 8192] [--batch 1536] [--steps 20]

Rows of text and images are drawn at random, without the packer, which would even them first: from none to 40 images each, of 16
to 1,024 merged tokens, as many as fit the row. Costs are the operations of forward and backward passes (plan/flops.py) with all
tokens trained, padding included. The first table deals the rows of a global batch to data-parallel ranks, as `data.even_ranks`
does: the whole model's work, and that of the vision tower and merger alone. The second deals the frames of every row to the
tensor and context ranks of a replica, as `parallel.vision: images` does.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from megatron_glmv.config.model import ModelConfig, ModelShape
from megatron_glmv.data.deal import deal_rows
from megatron_glmv.plan.flops import forward_flops, training_flops
from megatron_glmv.sequence.cost import cost_model, deal_frames

MOST_IMAGES = 40
REPLICAS = (8, 32, 64, 128, 256)
SHARES = (2, 4, 8)


@dataclass(frozen=True)
class Row:
    """One packed row: token counts of its documents, padding last, and its frames in patches."""

    documents: tuple[int, ...]
    frames: tuple[tuple[int, int], ...]

    @property
    def patches(self) -> list[int]:
        """Patches of each frame."""
        return [rows * columns for rows, columns in self.frames]


def draw_row(random: np.random.Generator, length: int) -> Row:
    """A row of 0 to MOST_IMAGES images, each with some text, each pair a document; text alone fills it."""
    documents: list[int] = []
    frames: list[tuple[int, int]] = []
    room = length
    for _ in range(int(random.integers(0, MOST_IMAGES + 1))):
        side = int(np.exp(random.uniform(np.log(4), np.log(32))))
        rows, columns = 2 * side, 2 * max(2, int(side * random.uniform(0.6, 1.0)))
        document = rows * columns // 4 + int(random.integers(10, 200))
        if document > room:
            break
        documents.append(document)
        frames.append((rows, columns))
        room -= document
    while room:
        document = min(room, int(random.lognormal(6, 1)) + 8)
        documents.append(document)
        room -= document
    return Row(tuple(documents), tuple(frames))


def row_cost(shape: ModelShape, row: Row) -> float:
    """What the loader knows of a row: the cost model over the sums of its index."""
    model = cost_model(shape)
    tokens = np.array(row.documents)
    patches = np.array(row.patches or [0])
    squares = [int((counts**2).sum()) for counts in (tokens, patches)]
    return model.row(int(tokens.sum()), int(tokens.sum()), int(tokens.sum()), squares[0], int(patches.sum()), squares[1])


def compare_replicas(shape: ModelShape, rows: list[list[Row]]) -> None:
    """The slowest replica over the mean, of rows in order and dealt."""
    counted = [[training_flops(shape, row.documents, row.frames) for row in step] for step in rows]
    whole = [np.array([flops.total for flops in step]) for step in counted]
    vision = [np.array([flops.vision + flops.merger for flops in step]) for step in counted]
    known = [[row_cost(shape, row) for row in step] for step in rows]
    batch = len(rows[0])
    print(f"| replicas | rows each | in order | dealt | vision alone, in order | dealt |\n{'| --- ' * 6}|")
    for replicas in (count for count in REPLICAS if batch % count == 0):
        in_order = [list(part) for part in np.array_split(np.arange(batch), replicas)]
        deals = [deal_rows(costs, replicas) for costs in known]
        cells = [slowest(work, way) for work in (whole, vision) for way in ([in_order] * len(rows), deals)]
        print(f"| {replicas} | {batch // replicas} | {' | '.join(cells)} |")


def slowest(work: list[np.ndarray], deals: list[list[list[int]]]) -> str:
    """The slowest replica over the mean: mean and worst over the steps."""
    found = [max(step[own].sum() for own in deal) / (step.sum() / len(deal)) for step, deal in zip(work, deals, strict=True)]
    return f"{np.mean(found):.3f} (worst {max(found):.3f})"


def compare_ranks(shape: ModelShape, rows: list[list[Row]]) -> None:
    """The slowest rank over the mean in the vision tower, of the frames of single rows; summed over a step's rows."""
    print(f"\n| ranks that share a row's frames | frames in order | dealt |\n{'| --- ' * 3}|")
    for ranks in SHARES:
        order, dealt = [0.0, 0.0], [0.0, 0.0]
        for row in (row for step in rows for row in step if row.frames):
            costs = np.array([forward_flops(shape, [], [frame]).total for frame in row.frames])
            parts = [costs[own].sum() for own in np.array_split(np.arange(len(costs)), ranks)]
            order = [order[0] + max(parts), order[1] + costs.sum() / ranks]
            parts = [costs[own].sum() for own in deal_frames(shape.vision, row.patches, ranks)]
            dealt = [dealt[0] + max(parts), dealt[1] + costs.sum() / ranks]
        print(f"| {ranks} | {order[0] / order[1]:.3f} | {dealt[0] / dealt[1]:.3f} |")


def main() -> None:
    """Parse the command line and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="glm-4.1v-9b", help="architecture")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=1536, help="rows of a global batch")
    parser.add_argument("--steps", type=int, default=20, help="global batches to average over")
    args = parser.parse_args()
    shape = ModelConfig(preset=args.preset).shape
    random = np.random.default_rng(0)
    rows = [[draw_row(random, args.length) for _ in range(args.batch)] for _ in range(args.steps)]
    images = [len(row.frames) for step in rows for row in step]
    print(f"{args.preset}, rows of {args.length:,} tokens with {min(images)} to {max(images)} images (mean "
          f"{np.mean(images):.1f}), {args.steps} batches of {args.batch:,} rows\n")  # fmt: skip
    compare_replicas(shape, rows)
    compare_ranks(shape, rows[:2])


if __name__ == "__main__":
    main()
