"""How the held-out samples of these tests are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NUM_SAMPLES = 40


def read_eval(data: Path) -> list[dict[str, Any]]:
    """The records of the held-out samples."""
    return [json.loads(line) for line in (data / "raw" / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
