"""What every test shares: one CPU thread for tensor work, an environment without settings, and the repository's root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported anywhere: two threads that compete with another process are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TINKER_TELEMETRY", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for _name in [name for name in os.environ if name.startswith("EVERLEARN_") and not name.startswith("EVERLEARN_TEST_")]:
    del os.environ[_name]


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parent.parent
