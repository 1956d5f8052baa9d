"""The bound on checkpoints (store.checkpoint_max_bytes)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from everlearn.api.tinker.weights import check_room
from everlearn.config import Settings
from everlearn.errors import Forbidden
from everlearn.store import checkpoints
from everlearn.store.checkpoints import TinkerPath

from .conftest import rig


def test_saves_are_refused_when_checkpoints_fill_their_bound(tmp_path: Path) -> None:
    async def go() -> None:
        async with rig(tmp_path) as r:
            run = await r.create()

            def services(limit: int) -> Any:
                settings = Settings.model_validate({"home": tmp_path, "store": {"checkpoint_max_bytes": limit}})
                return SimpleNamespace(settings=settings, read=r.dispatcher.ledger.read)

            path, about = TinkerPath(run, "weights", "ck"), {"version": "v", "sha256": "", "optimizer": True}
            await r.dispatcher.ledger.write(lambda conn: checkpoints.add(conn, "a", path, folder=str(tmp_path / "ck"), bytes=100, **about))
            await check_room(services(0))
            await check_room(services(101))
            await check_room(services(150), wanted=50)
            for limit, wanted in ((100, 1), (150, 51)):
                with pytest.raises(Forbidden, match="checkpoint_max_bytes"):
                    await check_room(services(limit), wanted)

    asyncio.run(go())
