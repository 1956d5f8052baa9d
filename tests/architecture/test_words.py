"""One name for each noun, and nothing in the repository that only its makers could understand."""

from __future__ import annotations

import re
from pathlib import Path

FOLDERS = ("everlearn", "docs", "tests", "benchmarks", "recipes")
FILES = ("README.md", "pyproject.toml", "mkdocs.yml", ".ci/run")
SUFFIXES = {".py", ".md", ".toml", ".yml", ".json", ".mako", ".html", ".sh"}


def texts(root: Path) -> dict[Path, str]:
    paths = [root / name for name in FILES]
    for folder in FOLDERS:
        paths += [path for path in (root / folder).rglob("*") if path.suffix in SUFFIXES and "__pycache__" not in path.parts]
    return {path.relative_to(root): path.read_text(encoding="utf-8") for path in paths if path.is_file()}


def test_each_noun_has_one_name(root: Path):
    glossary = (root / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \*\*([^|*]+)\*\* \| [^|]+ \| ([^|]*) \|$", glossary, flags=re.M)
    assert len(rows) > 15
    banned = {word.strip(): name for name, words in rows for word in words.split(",") if word.strip()}
    # Behind a hyphen it is part of a name that others gave. One search for all words, the longer first: a search for each takes seconds.
    any_of = "|".join(re.escape(word) for word in sorted(banned, key=len, reverse=True))
    looked_for = re.compile(rf"(?<![-\w])({any_of})s?\b", flags=re.I)
    by_word = {word.lower(): name for word, name in banned.items()}
    found = [
        f"{path}: {match[1]!r} is called {by_word[match[1].lower()]!r} here"
        for path, text in texts(root).items()
        if path.parts[0] in ("everlearn", "docs", "README.md") and path != Path("docs/glossary.md")
        if "migrations" not in path.parts  # there the words are those of the migration library
        for match in looked_for.finditer(text)
    ]
    assert not found


def test_nothing_names_the_workshop(root: Path):
    """Paths of the makers' machine, numbers of their tracker, and hosts of package registries."""
    here = Path(__file__).relative_to(root)
    private = re.compile(r"(?<![\w.])/(work|farm)/|(?<![\w/])\.\./shared/|\bissue #|\bissues? \d|pypi\.org|pythonhosted|npmjs", flags=re.I)
    found = {str(path): match[0] for path, text in texts(root).items() if path != here and (match := private.search(text))}
    assert not found


def test_every_setting_is_used(root: Path, sources):
    """A setting that nothing reads is a wish accepted and ignored."""
    from everlearn.config import leaves

    code = "\n".join((root / source.path).read_text(encoding="utf-8") for source in sources if source.module != "everlearn.config")
    unused = [key for key in leaves() if not re.search(rf"\.{key.rsplit('.', 1)[-1]}\b", code)]
    assert not unused
