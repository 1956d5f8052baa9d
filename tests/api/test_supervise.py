"""Engines that hang: before they speak, while they load, while they work. Each is killed, its successor serves, and the reason is told."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from everlearn.api import deaths, supervise
from everlearn.api.deaths import Death, describe, out_of_memory_kills

from .conftest import rig


@pytest.mark.parametrize(
    ("fault", "settings", "reason"),
    [
        ("no-load", {"stuck_seconds": 1.0}, "it wasn't ready after 1 s (engine.stuck_seconds)"),
        ("no-start", {}, "it sent no heartbeat for 1 s"),
        ("stuck", {"stuck_seconds": 900.0}, "it was busy with 'train' without progress for 900 s (engine.stuck_seconds)"),
    ],
)
def test_an_engine_that_hangs_is_killed(tmp_path: Path, monkeypatch, fault: str, settings: dict[str, float], reason: str) -> None:
    async def go() -> None:
        (tmp_path / fault).touch()
        async with rig(tmp_path, **settings) as r:
            await r.until(lambda: r.engine.restarts > 0)
            assert r.engine.last_death == Death(f"was killed because {reason}", from_outside=False)
            (tmp_path / fault).unlink()
            model = await r.create()
            await r.step(model, 1)
            assert await r.effects(model, 1) == [0, 1]

    if fault == "no-start":
        monkeypatch.setattr(supervise, "LOADING_HUNG_SECONDS", 1.0)
    asyncio.run(go())


def test_a_model_that_can_not_be_loaded_is_said_once(tmp_path: Path) -> None:
    """By the real engine: no loop of restarts, and the reason is the loader's own."""
    from everlearn.api.supervise import EngineProcess
    from everlearn.config import Settings
    from tests.tiny import make_tiny_model

    folder = make_tiny_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model.gone")
    (folder / "other.safetensors").write_bytes(b"")
    base = [{"name": "m", "path": str(folder)}]
    settings = Settings.model_validate({"home": tmp_path, "engine": {"threads": 1}, "models": {"default": "m", "base": base}})

    async def go() -> None:
        engine = EngineProcess(settings)
        engine.start()
        async with asyncio.timeout(200):
            while engine.state != "failed":
                await asyncio.sleep(0.05)
        assert engine.restarts == 1 and "can't be loaded: base model 'm'" in engine.reason, engine.reason
        await engine.stop(0.0)

    asyncio.run(go())


def test_a_machine_that_slept_finds_its_engine_as_it_was(tmp_path: Path, monkeypatch) -> None:
    """The supervisor stood still as well: the first thing that it sees is a long silence, which is its own."""
    monkeypatch.setattr(supervise, "HUNG_SECONDS", 2.0)
    monkeypatch.setattr(supervise, "LATE_SECONDS", 1.0)

    async def go() -> None:
        async with rig(tmp_path) as r:
            await r.up()
            pid = r.engine.pid
            time.sleep(3.0)  # noqa: ASYNC251  # nothing runs in this process
            await asyncio.sleep(1.5)
            assert (r.engine.pid, r.engine.restarts) == (pid, 0)

    asyncio.run(go())


def test_who_killed_it_is_told_as_far_as_it_is_known(tmp_path: Path, monkeypatch) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("pgfault 7\noom_kill 2\nhtlb 1\n")
    monkeypatch.setattr(deaths, "VMSTAT", vmstat)
    assert out_of_memory_kills() == 2
    assert describe(-9, "", 2) == Death("was killed by SIGKILL (from outside)", True)
    assert describe(-9, "", 1) == Death("was killed by SIGKILL (out of memory)", False)
    assert describe(-9, "it hung", 2) == Death("was killed because it hung", False)
    assert describe(-15, "", 2).from_outside and not describe(-11, "", 2).from_outside
    assert describe(3, "", 2) == Death("ended with exit status 3", False)
    monkeypatch.setattr(deaths, "VMSTAT", tmp_path / "nothing")
    assert describe(-9, "", None) == Death("was killed by SIGKILL (out of memory?)", False)


def test_kills_from_outside_blame_nobody_soon(tmp_path: Path) -> None:
    """A long request that is in the engine whenever somebody kills it is never given up for that."""

    async def go() -> None:
        async with rig(tmp_path, restart_limit=100) as r:
            sampler = await r.sampler()
            await r.up()
            await r.sample(sampler, 0, max_tokens=666)  # never answers
            for _ in range(7):
                await r.until(lambda: r.dispatcher.stats()["commands_in_engine"] == 1)
                await r.kill()
                await r.up()
            assert out_of_memory_kills() is None or r.engine.last_death.from_outside
            await r.until(lambda: r.dispatcher.stats()["commands_in_engine"] == 1)
            assert len(r.dispatcher.ledger) == 1 and not r.dispatcher.quarantine.active

    asyncio.run(go())
