"""What every route can reach: `request.app.state.services`.

One object, built once at start (`everlearn/api/app.py`), never rebound. Routes get it with `services(request)` and the caller's
tenant with `everlearn.api.auth.tenant(request)`. It knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import Request

from everlearn.config import Settings

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from everlearn.api.chatmodels import ChatModels
    from everlearn.api.dispatch import Dispatcher
    from everlearn.api.limiter import Limiter
    from everlearn.api.ops import Metrics
    from everlearn.api.recorder import Recorder
    from everlearn.api.refilling import Refills
    from everlearn.api.rewarding import Rewarding
    from everlearn.api.serving import Serving
    from everlearn.api.shadow import Shadows
    from everlearn.api.supervise import EngineProcess
    from everlearn.models.catalog import Catalog
    from everlearn.store.db import Database
    from everlearn.store.runs import Sampler

T = TypeVar("T")


@dataclass(frozen=True)
class Services:
    settings: Settings
    db: Database
    catalog: Catalog
    engine: EngineProcess
    dispatcher: Dispatcher
    metrics: Metrics
    serving: Serving
    chat_models: ChatModels
    limiter: Limiter
    records: Recorder
    shadows: Shadows
    refills: Refills
    rewarding: Rewarding = field(init=False)  # a client of all the others: the app sets it
    started_at: float = field(default_factory=time.time)
    samplers: dict[tuple[str, str], Sampler] = field(default_factory=dict)  # (tenant, id): those whose weights never change

    async def read(self, fn: Callable[[Connection], T]) -> T:
        """Runs a read in a thread: nothing blocks the event loop."""
        return await asyncio.to_thread(self.db.read, fn)

    async def write(self, fn: Callable[[Connection], T]) -> T:
        """Runs `fn` in the writer's next transaction; returns when that is on disk."""
        return await asyncio.wrap_future(self.db.write(fn))


def services(request: Request) -> Services:
    return request.app.state.services
