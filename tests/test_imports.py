"""No first-party import inside a function: the floors that import-linter checks then hold for every line that runs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("megatron_glmv", "data_tools") for path in (ROOT / package).rglob("*.py"))


def first_party_inside_functions(source: str) -> list[int]:
    """Line numbers of imports of this project inside functions."""
    lines = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if any(name.split(".")[0] in ("megatron_glmv", "data_tools") for name in names):
                    lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_first_party_imports_stand_at_the_top(path: Path):
    assert first_party_inside_functions(path.read_text(encoding="utf-8")) == []


def test_the_check_sees_both_forms_of_import():
    source = "def f():\n    from megatron_glmv.config import base\n\ndef g():\n    import data_tools.cli\n    import torch\n"
    assert first_party_inside_functions(source) == [2, 5]
