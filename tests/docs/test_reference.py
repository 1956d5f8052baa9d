"""The generated pages say what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest


def generator(root: Path):
    spec = importlib.util.spec_from_file_location("generate", root / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["settings.md", "cli.md", "errors.md"])
def test_generated_page_is_up_to_date(root: Path, name: str):
    page = generator(root).PAGES[name]()
    assert (root / "docs" / "reference" / name).read_text(encoding="utf-8") == page, "run: python docs/generate.py"


def test_every_page_is_in_the_navigation(root: Path):
    navigation = set(re.findall(r"^\s+- (?:[^:\n]+: )?(\S+\.md)$", (root / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.M))
    pages = {str(path.relative_to(root / "docs")) for path in (root / "docs").rglob("*.md")}
    assert navigation == pages


def test_files_named_in_the_docs_exist(root: Path):
    missing = []
    for page in [root / "README.md", *(root / "docs").rglob("*.md")]:
        for name in re.findall(r"`((?:everlearn|tests|docs|benchmarks)/[\w./-]+\.\w+)`", page.read_text(encoding="utf-8")):
            if not (root / name).exists():
                missing.append(f"{page.relative_to(root)}: {name}")
    assert not missing


def test_commands_named_in_the_docs_exist(root: Path):
    from everlearn.cli.main import ACTS, NOUNS

    for page in [root / "README.md", *(root / "docs").rglob("*.md")]:
        for name in re.findall(r"(?:`|bin/)everlearn ([a-z]+)", page.read_text(encoding="utf-8"), flags=re.M):
            assert name in ACTS or name in NOUNS, f"{page.relative_to(root)}: everlearn {name}"
