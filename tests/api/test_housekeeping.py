"""What is done now and then is done, whatever else happens."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from everlearn.api import housekeeping
from everlearn.api.housekeeping import Housekeeping


def test_snapshots_do_not_put_off_what_has_expired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "SWEEP_SECONDS", 0.2)
    monkeypatch.setattr(housekeeping, "SWEEP_AT_LEAST", 0.01)
    expired, collected = [], []

    class Watched(Housekeeping):
        async def _expire(self) -> None:
            expired.append(asyncio.get_running_loop().time())

        async def _remove_garbage(self) -> None:
            collected.append(1)

    async def go() -> None:
        services: Any = SimpleNamespace()
        keeper = Watched(services)
        sweeps = asyncio.create_task(keeper._sweeps())
        for _ in range(100):
            keeper._sweep_now.set()  # as every snapshot does
            await asyncio.sleep(0.01)
        sweeps.cancel()

    asyncio.run(go())
    assert len(expired) >= 3 and len(collected) > 2 * len(expired)
