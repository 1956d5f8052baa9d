"""A dispatcher on a real store, with a peer process in the engine's place; driven from plain test functions."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from everlearn.api.dispatch import Dispatcher, Done, Failed, Outcome
from everlearn.api.ops import Metrics
from everlearn.api.supervise import EngineProcess
from everlearn.config import Settings
from everlearn.engine import protocol as p
from everlearn.store import garbage, runs
from everlearn.store.db import Database, open_database
from everlearn.store.log import Entry
from everlearn.types import AdamParams, Array, LoraSpec, SamplingParams

LORA = LoraSpec(rank=4, seed=1)


class Rig:
    """One session of one tenant, and the verbs that tests need."""

    def __init__(self, settings: Settings, db: Database, engine: EngineProcess, dispatcher: Dispatcher):
        self.settings, self.db, self.engine, self.dispatcher = settings, db, engine, dispatcher
        self.session = ""

    async def create(self, number: int = 0, tenant: str = "a") -> str:
        if not self.session:
            made = await self.dispatcher.ledger.write(lambda conn: runs.create_session(conn, tenant))
            self.session = made.session_id
        model = runs.run_id(self.session, number)
        meta = {
            "session_id": self.session,
            "model_seq_id": number,
            "base_model": "m",
            "lora": msgspec.to_builtins(LORA),
            "user_metadata": None,
        }
        await self.submit(p.Create(f"{model}:0", model, tenant, "m", LORA), tenant, meta)
        return model

    async def submit(self, command: Any, tenant: str = "a", meta: dict[str, Any] | None = None, **place: Any) -> Entry:
        fingerprint = hashlib.sha256(p.encode(command)).hexdigest()
        return await self.dispatcher.submit(tenant, command, fingerprint=fingerprint, meta=meta or {}, **place)

    async def forward(self, model: str, seq: int, only: bool = False, wish: str = "", **config: float) -> Entry:
        """`wish` stands in the place of the loss's name: the peer does what it says."""
        command = p.ForwardBackward(f"{model}:{seq}", model, seq, [], wish, config, only)
        return await self.submit(command, meta={"forward_only": only})

    async def step(self, model: str, seq: int) -> Entry:
        return await self.submit(p.OptimStep(f"{model}:{seq}", model, seq, AdamParams()))

    async def sampler(self) -> str:
        if not self.session:
            self.session = (await self.dispatcher.ledger.write(lambda conn: runs.create_session(conn, "a"))).session_id
        made = await self.dispatcher.ledger.write(
            lambda conn: runs.create_sampler(conn, "a", session_id=self.session, seq=0, base_model="m")
        )
        return made.sampler_id

    async def sample(self, sampler: str, seq: int, *, max_tokens: int = 1, num_samples: int = 1) -> Entry:
        prompt = Array("int32", [1], bytes(4))
        params = SamplingParams(max_tokens=max_tokens, seed=seq + 40)
        command = p.Sample(f"{sampler}:{seq}", "m", "", "", "a", prompt, num_samples, params)
        return await self.submit(command, model_id=sampler, seq=seq)

    async def outcome(self, request_id: str, tenant: str = "a", timeout: float = 120.0) -> Outcome:
        return await self.dispatcher.wait(tenant, request_id, timeout)

    async def effects(self, model: str, seq: int) -> list[int]:
        """The effects that the adapter had at optim_step `seq`, in order."""
        done = await self.outcome(f"{model}:{seq}")
        assert isinstance(done, Done), done
        return [int(key.split(":")[1]) for key in sorted(done.result.metrics, key=lambda key: int(key.split(":")[0]))]

    async def until(self, condition: Callable[[], bool], seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            await asyncio.sleep(0.01)

    async def kill(self) -> None:
        """SIGKILL; returns when the supervisor knows."""
        generation, pid = self.engine.generation, self.engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await self.until(lambda: self.engine.generation != generation or not self.engine.up)

    async def up(self) -> None:
        await self.until(lambda: self.engine.up)

    def heard(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.settings.home / "heard.jsonl").read_text().splitlines()]

    async def failed(self, request_id: str) -> dict[str, Any]:
        outcome = await self.outcome(request_id)
        assert isinstance(outcome, Failed), outcome
        return outcome.error


@contextlib.asynccontextmanager
async def rig(home: Path, session: str = "", api: dict[str, Any] | None = None, **engine_settings: Any) -> AsyncIterator[Rig]:
    """A fresh process in effect: database, engine process and dispatcher opened, and ended as a crash would (nothing drained)."""
    settings = Settings.model_validate({"home": home, "api": api or {}, "engine": engine_settings})
    db = open_database(settings.store_url)
    garbage.boot_sweep(db, home, time.time())
    engine = EngineProcess(settings, module="tests.api.peer")
    made = Rig(settings, db, engine, Dispatcher(settings, db, engine, Metrics()))
    made.session = session
    await made.dispatcher.start()
    engine.start()
    try:
        yield made
    finally:
        await engine.stop(grace=0.0)
        await made.dispatcher.stop()
        db.close()
