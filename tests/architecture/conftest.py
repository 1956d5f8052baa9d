"""The package as a list of parsed source files."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

import pytest


class Source(NamedTuple):
    """One file of the package. `module` is its dotted name, `lines` what a reader scrolls through."""

    path: Path
    module: str
    tree: ast.Module
    lines: int

    @property
    def section(self) -> str:
        """The first name under the package: "api", "store", "config"."""
        parts = self.module.split(".")
        return parts[1] if len(parts) > 1 else ""

    def imports(self, top_level: bool) -> set[str]:
        """Dotted names that this file imports; `top_level`: only those that run when it is imported (not TYPE_CHECKING, not in functions)."""
        names: set[str] = set()
        for node in _walk(self.tree, top_level):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        return names


def _walk(tree: ast.AST, top_level: bool):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if not (top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            yield from _walk(node, top_level)


@pytest.fixture(scope="session")
def sources(root: Path) -> list[Source]:
    found = []
    for path in sorted((root / "everlearn").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Source(path.relative_to(root), module, ast.parse(text), text.count("\n")))
    return found
