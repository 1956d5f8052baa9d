"""Result files say what was measured, and nothing of where on its makers' machine."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest


def test_the_name_of_a_result_holds_no_path(root: Path) -> None:
    files = sorted((root / "benchmarks" / "results").glob("*.json"))
    names = {file.name: json.loads(file.read_text(encoding="utf-8")).get("benchmark", "none") for file in files}
    assert len(names) > 5 and not {file: name for file, name in names.items() if not re.fullmatch(r"[A-Za-z0-9._-]+", name)}


def test_a_model_s_folder_gives_its_own_name_alone(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    common = importlib.import_module("common")
    try:
        assert [common.short(name) for name in ("smollm2", "random-16m", str(tmp_path / "models" / "mine"), "models/mine/")] == [
            "smollm2",
            "random-16m",
            "mine",
            "mine",
        ]
    finally:
        del sys.modules["common"]
