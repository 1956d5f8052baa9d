"""The longest files and functions stay short enough to read, and each kind of code stays in its place."""

from __future__ import annotations

import ast
from pathlib import Path

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
TOUR = [
    "everlearn/api/app.py",
    "everlearn/api/tinker/training.py",
    "everlearn/store/log.py",
    "everlearn/engine/engine.py",
    "everlearn/engine/trainer.py",
    "everlearn/losses/policy.py",
    "everlearn/store/checkpoints.py",
]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_files_are_short(sources):
    longest = {str(source.path): source.lines for source in sources if source.lines > 400}
    assert all(lines <= 500 for lines in longest.values()), longest
    assert len(longest) <= 0.05 * len(sources), f"400 lines is the rule, 500 the exception: {longest}"


def test_functions_are_short(sources):
    functions = [
        (f"{source.path}:{node.name}", length(node))
        for source in sources
        if "migrations" not in source.path.parts  # a migration is a record of tables, written once
        for node in ast.walk(source.tree)
        if isinstance(node, FUNCTION)
    ]
    long = {name: lines for name, lines in functions if lines > 60}
    assert all(lines <= 80 for lines in long.values()), long
    assert len(long) <= 0.01 * len(functions), f"60 lines is the rule, 80 the exception: {long}"


def test_package_files_hold_no_code(sources):
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    for source in sources:
        if source.path.name == "__init__.py":
            assert source.lines <= 30, source.path
            body = [node for node in source.tree.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
            assert all(isinstance(node, allowed) for node in body), source.path


def test_there_is_no_drawer_for_everything(sources):
    assert not [source.path for source in sources if source.path.stem in ("utils", "util", "helpers", "misc", "common")]


def test_async_stays_at_the_edges(sources):
    plain = {"engine", "losses", "models", "planner", "store"}
    asynchronous = [
        f"{source.path}:{node.name}"
        for source in sources
        if source.section in plain
        for node in ast.walk(source.tree)
        if isinstance(node, ast.AsyncFunctionDef)
    ]
    assert not asynchronous


def test_the_environment_is_read_in_one_place(sources):
    readers = [
        f"{source.path}:{node.lineno}"
        for source in sources
        if source.module != "everlearn.config"
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.environb"))
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {alias.name for alias in node.names} & {"environ", "getenv"})
    ]
    assert not readers


def test_no_error_is_swallowed(sources):
    swallowed = [
        f"{source.path}:{node.lineno}"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and all(isinstance(statement, (ast.Pass, ast.Continue)) for statement in node.body)
    ]
    assert not swallowed


def ours(source) -> set[str]:
    """Names in this file that stand for classes of the package."""
    defined = {node.name for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)}
    imported = {
        alias.asname or alias.name
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("everlearn")
        for alias in node.names
    }
    return defined | imported


def test_inheritance_is_one_step_deep(sources):
    """Tables over towers: a class of ours may have a base of ours, but that base has none (errors form the one drawn hierarchy)."""
    bases: dict[str, set[str]] = {}
    for source in sources:
        if source.module != "everlearn.errors":
            for node in ast.walk(source.tree):
                if isinstance(node, ast.ClassDef):
                    bases.setdefault(node.name, set()).update({ast.unparse(base) for base in node.bases} & ours(source))
    assert not [name for name, own in bases.items() if any(bases.get(base) for base in own)]


def test_the_tour_is_short(root: Path):
    text = (root / "docs" / "tour.md").read_text(encoding="utf-8")
    lines = {file: (root / file).read_text(encoding="utf-8").count("\n") for file in TOUR}
    assert sum(lines.values()) <= 1800, lines
    assert [file for file in TOUR if file not in text] == []
