"""A real vLLM server on this machine, started by the script that users start theirs with."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS = "--dtype float32 --max-model-len 1024 --max-num-seqs 16 --kv-cache-memory-bytes 256M --api-key sesame"
START_S = 180


class VllmServer:
    """One server in a process group of its own.

    Args:
        interpreter: of its environment.
        model: Hugging Face folder.
        folder: for its log and its temporary files.
    """

    def __init__(self, interpreter: Path, model: Path, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "server.log"
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        path = f"{interpreter.parent}:/usr/local/bin:/usr/bin:/bin"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", str(REPOSITORY / "examples/vllm_server.sh"), str(model), str(port), *OPTIONS.split()],
                env=kept | {"PATH": path, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(self.url + "/health", timeout=2, trust_env=False).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.5)
        raise RuntimeError(f"the vLLM server did not start within {START_S} s:\n{self.tail()}")

    def tail(self) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:])

    def kill(self) -> None:
        """End it at once, as a machine that fails would."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """End it as a user does; its three processes end with it, or are ended."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
