"""What every test shares: a tiny model, real servers in their own processes, one CPU thread, an environment without settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.live import LiveServer, start_server
from tests.tiny import make_tiny_model

# Before torch is imported anywhere: two threads that compete with another process are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TINKER_TELEMETRY", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for _name in [name for name in os.environ if name.startswith("EVERLEARN_") and not name.startswith("EVERLEARN_TEST_")]:
    del os.environ[_name]

# Hypothesis lets an example take 200 ms; on a machine that does other things too, a good one takes longer. Tests have a timeout anyway.
# The same examples in every run: a suite that passed passes again. `pytest --hypothesis-profile search` draws others.
settings.register_profile("search", deadline=None)
settings.register_profile("everlearn", deadline=None, derandomize=True)
settings.load_profile("everlearn")


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama (hidden 64, vocabulary 512) with a byte-level BPE tokenizer, as a Hugging Face folder."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server on the tiny model for all tests that don't hurt it. Its base model is `tiny`."""
    live = start_server(tmp_path_factory.mktemp("home"), tiny_model)
    yield live
    live.stop()


@pytest.fixture
def new_server(tiny_model: Path, tmp_path: Path) -> Iterator[Callable[..., LiveServer]]:
    """A function that starts a server of the test's own: `new_server(**settings)`; keys are dotted (`"engine.threads": 1`)."""
    started: list[LiveServer] = []

    def start(home: Path | None = None, **settings: object) -> LiveServer:
        live = start_server(home or tmp_path / "home", tiny_model, settings)
        started.append(live)
        return live

    yield start
    for live in started:
        live.stop()
