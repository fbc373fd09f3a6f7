"""Which engine samples the answers: in the trainer's processes, or vLLM servers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from megatron_glmv.config.base import Config
from megatron_glmv.config.http import Address, AskingConfig, TokenEnv


class EngineBase(Config):
    """What every engine can set."""

    gap_alarm: float | None = Field(default=0.05, gt=0)
    """Mean absolute difference of the engine's and the trainer's log-probabilities, in nats, above which the run warns; null:
    never. Rounding of bfloat16 alone gives a few hundredths; wrong weights or pictures give tenths and more."""
    max_missing_share: float = Field(default=0.25, ge=0, le=1)
    """The run stops when the engine leaves out more than this share of a wave's answers; fewer are counted and done without."""


class EmbeddedConfig(EngineBase):
    """transformers' model in every trainer process; nothing to start."""

    kind: Literal["embedded"] = "embedded"
    max_answers: int = Field(default=64, ge=1)
    """Answers that decode together on one rank."""


class DiskWeights(Config):
    """New weights as a folder of safetensors that the servers read; works with every server."""

    kind: Literal["disk"] = "disk"
    folder: Path
    """Where they are put, in a folder weights-VERSION each; of this run alone, and the servers must see it under the same path.
    The latest one stays, and one more while the next is written. /dev/shm is fastest where all servers run on the trainer's
    machine."""


class VllmConfig(EngineBase, AskingConfig):
    """vLLM servers, started by a script (examples/vllm_server.sh)."""

    kind: Literal["vllm"] = "vllm"
    addresses: tuple[Address, ...] = Field(default=("http://127.0.0.1:8000",), min_length=1)
    """Of the servers; prompts are dealt over them. Their weight endpoints have no password: loopback or a closed network."""
    model: str = "policy"
    """Name under which they serve the policy (--served-model-name)."""
    token_env: TokenEnv | None = None
    """Environment variable that holds the bearer token (--api-key). The token itself is never written anywhere."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Longest wait for the answers of one request, time in the server's queue included, and for the loading of weights."""
    concurrency: int = Field(default=64, ge=1, le=512)
    """Requests of one rank under way at once, over all servers."""
    answers_per_request: int = Field(default=8, ge=1)
    """Answers that one request asks for: its pictures are sent once for all of them, and a request that fails loses them all.
    At most the server's --max-num-seqs."""
    weights: DiskWeights
    """How new weights reach the servers."""


def _kind(given: Any) -> Any:
    """The kind of an engine; one that is not named is embedded."""
    return given.get("kind", "embedded") if isinstance(given, Mapping) else getattr(given, "kind", None)


EngineConfig = Annotated[
    Annotated[EmbeddedConfig, Tag("embedded")] | Annotated[VllmConfig, Tag("vllm")],
    Discriminator(_kind, "unknown_engine", "kind: there are embedded and vllm"),
]
"""One of the engines, by its kind; embedded where none is named."""
