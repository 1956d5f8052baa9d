"""/dashboard/events: which parts of the pages have changed. The pages then fetch those parts again.

A module of a page says in `LIVE`, by the name of a part, what to look at; its value is whatever differs after a change: a count, a newest
id. Looking is one short read for all streams of a tenant, once a second at most, and none while nobody watches. A stream says nothing of
what changed, ends after some minutes (browsers come again), and there are only so many.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec
from fastapi import Request
from sqlalchemy import Connection

from everlearn.api import auth, sse
from everlearn.api.services import Services, services
from everlearn.errors import EverlearnError, Overloaded

Look = Callable[[Services, Connection, str], Any]

TICK_SECONDS = 1.0
STREAM_SECONDS = 300.0
MAX_STREAMS = 128
MAX_OF_TENANT = 32
TENANTS_KEPT = 256
RETRY = b"retry: 2000\n\n"


class Parts:
    """Of one app: what is looked at, what was seen last, and how many streams are open for each tenant."""

    def __init__(self, looks: Mapping[str, Look]):
        self.looks = dict(looks)
        self.streams: dict[str, int] = {}
        self._seen: OrderedDict[str, tuple[float, dict[str, str]]] = OrderedDict()
        self._lock = asyncio.Lock()

    async def seen(self, svc: Services, tenant: str) -> dict[str, str]:
        """For each part a digest that differs after a change; as of a second ago at most."""
        async with self._lock:
            at, found = self._seen.get(tenant, (0.0, {}))
            if time.monotonic() - at >= TICK_SECONDS:
                found = await svc.read(lambda conn: {name: digest(look(svc, conn, tenant)) for name, look in self.looks.items()})
                self._seen[tenant] = (time.monotonic(), found)
                self._seen.move_to_end(tenant)
                if len(self._seen) > TENANTS_KEPT:
                    self._seen.popitem(last=False)
        return found

    def enter(self, tenant: str) -> None:
        if self.streams.get(tenant, 0) >= MAX_OF_TENANT or sum(self.streams.values()) >= MAX_STREAMS:
            raise Overloaded(f"{sum(self.streams.values())} dashboards are open here; close some (at most {MAX_OF_TENANT} for one tenant)")
        self.streams[tenant] = self.streams.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        self.streams[tenant] -= 1
        if not self.streams[tenant]:
            del self.streams[tenant]


def digest(value: Any) -> str:
    return hashlib.blake2b(repr(value).encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


async def seen(request: Request) -> dict[str, str]:
    parts: Parts = request.app.state.parts
    return await parts.seen(services(request), auth.tenant(request))


async def events(request: Request) -> sse.EventStream:
    parts: Parts = request.app.state.parts
    svc, owner, gone = services(request), auth.tenant(request), asyncio.Event()
    parts.enter(owner)
    watch = sse.Watch(request, gone.set)

    def end() -> None:
        watch.stop()
        parts.leave(owner)

    return sse.EventStream(changes(parts, svc, owner, gone), {}, failed, end)


async def changes(parts: Parts, svc: Services, tenant: str, gone: asyncio.Event) -> AsyncIterator[bytes]:
    """All digests at first and after each change, until the client goes, the server ends or the time is up."""
    ends, told = time.monotonic() + STREAM_SECONDS, None
    yield RETRY
    while not (gone.is_set() or svc.dispatcher.draining or time.monotonic() > ends):
        found = await parts.seen(svc, tenant)
        if found != told:
            yield sse.data(msgspec.json.encode(found))
            told = found
        try:
            async with asyncio.timeout(TICK_SECONDS):
                await gone.wait()
        except TimeoutError:
            continue


def failed(error: EverlearnError) -> bytes:
    """The browser comes again; a page that can't be fetched then says why."""
    return b"event: end\n" + sse.data(msgspec.json.encode({"code": error.code}))
