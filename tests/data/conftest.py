"""What tests of decoding share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def alive() -> Iterator[Callable[[type], int]]:
    """Counts objects of a kind, while no garbage is collected, as hardly any is in training, whose heap is frozen."""
    gc.collect()
    gc.disable()
    yield lambda kind: sum(isinstance(thing, kind) for thing in gc.get_objects())
    gc.enable()
    gc.collect()
