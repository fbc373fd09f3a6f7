"""Servers that a run asks: addresses, the variable that holds the token, and how long to try."""

from __future__ import annotations

import ipaddress
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from megatron_glmv.config.base import Config


def is_loopback(url: str) -> bool:
    """Whether the server at an address runs on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("not an http(s) address")
    if parts.username or parts.password:
        raise ValueError("holds a user name or password; put the token into an environment variable, see token_env")
    return url.rstrip("/")


Address = Annotated[str, AfterValidator(_address)]
"""Of a server, without a path's last slash and without a password."""
TokenEnv = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""Name of an environment variable that holds a bearer token."""


class AskingConfig(Config):
    """Rules of every client that asks a server."""

    timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait for one reply, from the first byte sent to the last received."""
    retries: int = Field(default=3, ge=0)
    """Further tries after an error, a time-out or a reply that cannot be read."""
    backoff_s: float = Field(default=0.5, ge=0)
    """Wait before the first further try; it doubles with each, and a random half is added."""
    concurrency: int = Field(default=16, ge=1, le=512)
    """Questions under way at once."""
