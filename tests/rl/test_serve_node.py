"""What a node of servers runs: one server that ends leaves the others of its node alone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.stages import REPOSITORY


def test_a_server_that_ends_leaves_the_others_alone(tmp_path: Path) -> None:
    """Stand-ins for the servers: the first dies at once, the second ends later; SLURM ends what runs when the script ends."""
    script = tmp_path / "examples" / "vllm_server.sh"
    script.parent.mkdir()
    script.write_text('[ "$2" = 9000 ] && exit 3\nsleep 1\necho "$1" >"$GLMV_ROOT/$2.txt"\n', encoding="utf-8")
    changes = {"GLMV_ROOT": str(tmp_path), "GLMV_SERVER_MODEL": "model", "GLMV_SERVER_PORT": "9000", "GLMV_SERVER_COUNT": "2"}
    changes |= {"GLMV_SERVER_GPUS": "1", "GLMV_SERVER_HOST": "127.0.0.1"}
    serve = ["bash", str(REPOSITORY / "examples/slurm/serve_node.sh")]
    log = tmp_path / "node.log"
    with log.open("w", encoding="utf-8") as output:  # no pipe, which would be open for as long as any server
        subprocess.run(serve, env={**os.environ, **changes}, stdout=output, timeout=60, check=False)
    assert (tmp_path / "9001.txt").read_text(encoding="utf-8") == "model\n"
    said = [f"glmv: the server of port {port} has ended with {code}" for port, code in ((9000, 3), (9001, 0))]
    assert log.read_text(encoding="utf-8").splitlines() == said
