"""Loading a configuration: YAML files merged left to right, then ``a.b=value`` overrides, then one strict pydantic tree.

Nothing here imports torch or Megatron, so that ``glmv check`` answers in a fraction of a second on any machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class InputError(ValueError):
    """Something given from outside cannot be used; the message is one line that names the file, key or sample and what to do.

    The command line shows the message alone; every other exception is a fault of the program and shows its traceback.
    """


class ConfigError(InputError):
    """A configuration that cannot be used."""


class Config(BaseModel):
    """Base of every configuration node: frozen, unknown keys are errors, defaults are validated too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


Root = TypeVar("Root", bound=Config)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two trees; mappings merge key by key, everything else in `over` replaces what `base` had."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """Turn ``a.b=value`` into ``{"a": {"b": value}}``; the value is read as YAML.

    Raises:
        ConfigError: the text has no ``=``, an empty key, or a value that is not YAML.
    """
    path, separator, value = text.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"override {text!r} is not of the form a.b=value")
    try:
        tree: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not YAML ({str(error).splitlines()[0]})") from error
    for key in reversed(keys):
        tree = {key: tree}
    return tree


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file whose top level is a mapping.

    Raises:
        ConfigError: the file is missing, not YAML, or not a mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of keys, not {type(tree).__name__}")
    return tree


def load(root: type[Root], files: Sequence[Path | str], overrides: Sequence[str] = ()) -> Root:
    """Merge `files` and `overrides` into one validated tree.

    Args:
        root: the pydantic class of the whole tree.
        files: YAML files; later ones win.
        overrides: ``a.b=value`` texts; they win over every file.

    Raises:
        ConfigError: one line naming the key at fault and what was expected.
    """
    return validate(root, load_tree(files, overrides), where=", ".join(str(file) for file in files))


def load_tree(files: Sequence[Path | str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Merge `files` and `overrides` into one plain tree.

    Raises:
        ConfigError: a file cannot be read, or an override cannot be parsed.
    """
    tree: dict[str, Any] = {}
    for file in files:
        tree = merge(tree, read_yaml(Path(file)))
    for text in overrides:
        tree = merge(tree, parse_override(text))
    return tree


def validate(root: type[Root], tree: Mapping[str, Any], where: str = "") -> Root:
    """Validate a plain tree; `where` names its origin in the error message."""
    try:
        return root.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigError(one_line(error, where)) from None


# Validators of a node name their own field first ("expert: ..."); the node's place is put before it.
_STARTS_WITH_KEY = re.compile(r"[a-z]\w*: ")


def one_line(error: ValidationError, where: str) -> str:
    """Every fault of a pydantic error in one line, the key first."""
    faults = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = "unknown key; `glmv check --schema` lists the keys there are"
        within = "." if _STARTS_WITH_KEY.match(message) else ": "
        faults.append(f"{key}{within}{message}" if key else message)
    return (f"{where}: " if where else "") + "; ".join(faults)


def to_yaml(config: Config) -> str:
    """The resolved tree as YAML, in the order of the fields."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
