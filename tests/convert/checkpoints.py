"""Checkpoints whose manifest was changed on purpose, with its sum made right again: damage is found elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_glmv.run_folder.checkpoint_folder import MANIFEST, read_manifest
from megatron_glmv.run_folder.checkpoint_sums import OWN_SUM, manifest_sum


def change_manifest(folder: Path, **changes: Any) -> None:
    """Give keys of a checkpoint's manifest other values."""
    changed = read_manifest(folder) | changes
    changed[OWN_SUM] = manifest_sum(changed)
    (folder / MANIFEST).write_text(json.dumps(changed), encoding="utf-8")
