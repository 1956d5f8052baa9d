"""Scripts under benchmarks/ as modules: they import each other by name, as they do when they are run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def study(root: Path, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The script that the test module names as STUDY."""
    folder, name = str(root / "benchmarks"), request.module.STUDY
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(folder)
        for loaded in (name, "common"):
            sys.modules.pop(loaded, None)
