#!/usr/bin/env python3
"""Stands for the command `vllm serve MODEL ... --port PORT`: a server that answers as vLLM was seen to."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.rl.fake_vllm import FakeVllm

if __name__ == "__main__":
    port = int(sys.argv[sys.argv.index("--port") + 1])
    host = sys.argv[len(sys.argv) - 1 - sys.argv[::-1].index("--host") + 1]
    print(f"serving {sys.argv[2]} on {host}:{port}", flush=True)
    FakeVllm(port=port)
    time.sleep(3600)
