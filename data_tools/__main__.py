"""`python -m data_tools`, the same as `glmv-data`; guarded because spawned workers import this module again."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from data_tools.cli import main

    sys.exit(main())
