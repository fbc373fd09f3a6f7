"""Pages opened in a real Chromium."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "chromium.sh"


def find_chromium() -> str:
    """The path of a Chromium, installed where that is possible; else the test is skipped with the reason."""
    found = subprocess.run([SCRIPT], capture_output=True, text=True, timeout=600, check=False)
    if found.returncode:
        pytest.skip(found.stderr.strip())
    return found.stdout.split()[0]


def browse(chromium: str, page: Path, *options: str) -> str:
    """What Chromium prints of a page with these options."""
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000",
               f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
