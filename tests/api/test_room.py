"""What is bounded for all: the queue, in which tenants have fair parts, and checkpoints (store.checkpoint_max_bytes)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everlearn.api.room import Room
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


def test_a_full_room_refuses_whoever_filled_it() -> None:
    room = Room(8)
    assert room.has("a", 8) and room.has("a", 9)  # who holds nothing is always let in
    room.take("a", 8)
    assert not room.has("a", 1) and room.has("b", 1) and room.share("b") == 4
    room.take("b", 3)
    assert room.has("b", 1) and not room.has("b", 2)
    room.give("a", 8)
    assert room.share("b") == 8 and room.has("b", 5) and not room.has("b", 6) and set(room.held) == {"b"}


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 4), st.booleans()), max_size=80))
def test_a_room_overfills_by_no_more_than_it_says(acts: list[tuple[str, int, bool]]) -> None:
    room, inside = Room(12), []
    for tenant, size, leaves in acts:
        if leaves and inside:
            room.give(*inside.pop(0))
        elif room.has(tenant, size):
            room.take(tenant, size)
            inside.append((tenant, size))
        assert room.total == sum(size for _, size in inside) <= 12 * (1 + 1 / 2 + 1 / 3 + 1 / 4) + 4 * 4
