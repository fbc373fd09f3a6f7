"""What is built before the first step is no work for the garbage collector while ranks wait for each other."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import gc
from types import SimpleNamespace

from megatron_glmv.rl import trainer
from megatron_glmv.training import loop

for room in (loop, trainer):
    gc.unfreeze()
    built = [[number] for number in range(100_000)]
    looked_at = []
    saves = SimpleNamespace(run_to_end=lambda *_: looked_at.append(len(gc.get_objects())))
    room.train(SimpleNamespace(saves=saves, state=None, config=SimpleNamespace(steps=0)))
    assert looked_at[0] < 1000, (room.__name__, looked_at)
    cycle = []
    cycle.append(cycle)
    del cycle
    assert gc.collect(), room.__name__
"""


def test_a_loop_leaves_the_collector_only_what_its_steps_make() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
