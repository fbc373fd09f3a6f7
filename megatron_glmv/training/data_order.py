"""A run that goes on where its data, or the number of rows of a step, are others than when it was saved: nothing silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_glmv.training.state import TrainState


def keep_rows(state: TrainState, global_batch_rows: int) -> list[str]:
    """Have a state that was saved with another global batch go on behind the last row read, at the next whole batch from there.

    Batches that a rollback leaves out stay left out, with the rows that now share a batch with theirs.

    Returns:
        What has changed, a line each.
    """
    was = state.order.get("global_batch_rows", global_batch_rows)
    if was == global_batch_rows:
        return []
    left_out: set[int] = set()
    for left in state.left_out:
        left_out.update(range(left * was // global_batch_rows, -(-(left + 1) * was // global_batch_rows)))
    state.batch, state.left_out = -(-state.batch * was // global_batch_rows), tuple(sorted(left_out))
    state.order = {**state.order, "global_batch_rows": global_batch_rows}
    row = state.batch * global_batch_rows
    return [f"a step takes {global_batch_rows:,} rows, not {was:,}: going on at row {row:,} of the order of the data"]


def adopt_order(state: TrainState, order: Mapping[str, Any]) -> list[str]:
    """Have a state remember the order that it goes on in: `RowStream.order`.

    Returns:
        What has changed, a line each.
    """
    before, state.order = state.order, dict(order)
    changes = _changes(before, order) if before else []
    if not changes:
        return []
    return [f"the order of the data is another one, so rows may come again or be left out: {'; '.join(changes)}"]


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What decides about the order, and differs."""
    found = [f"{key} is {now[key]}, not {before[key]}" for key in ("seed", "shuffle") if now[key] != before[key]]
    old, new = before["sources"], now["sources"]
    found += [f"source {name!r} is gone" for name in old if name not in new]
    found += [f"source {name!r} is new" for name in new if name not in old]
    for name in (name for name in old if name in new):
        if old[name]["rows"] != new[name]["rows"]:
            found.append(f"source {name!r} has {new[name]['rows']:,} rows, not {old[name]['rows']:,}")
        if old[name]["weight"] != new[name]["weight"]:
            found.append(f"source {name!r} weighs {new[name]['weight']}, not {old[name]['weight']}")
    if not found and list(old) != list(new):
        found.append("sources are listed in another order")
    return found
