"""Bodies: whose they are, how much and how fast they come; counted while they are read, after decompression; packed and broken ones."""

from __future__ import annotations

import asyncio
import gzip
import os
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import zstandard
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from everlearn.api import limits
from everlearn.api.limits import HELD_BODIES, BodyLimit
from everlearn.errors import EverlearnError, Unauthenticated

LIMIT = 100_000
PACK = {"zstd": zstandard.ZstdCompressor().compress, "gzip": gzip.compress, "deflate": zlib.compress}


async def echo(request: Request) -> PlainTextResponse:
    """Says how long the body was, and whether the route still sees that it came packed."""
    return PlainTextResponse(f"{len(await request.body())} {request.headers.get('content-encoding')}")


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = Starlette(routes=[Route("/", echo, methods=["POST"])])
    app.add_middleware(BodyLimit, max_bytes=LIMIT)
    with TestClient(app) as made:
        yield made


@pytest.mark.parametrize("name", PACK)
def test_packed_bodies_arrive_inflated(client: TestClient, name: str) -> None:
    for body in (b"", b"x", os.urandom(50_000), bytes(LIMIT)):
        assert client.post("/", content=PACK[name](body), headers={"content-encoding": name}).text == f"{len(body)} None"


@pytest.mark.parametrize("name", PACK)
def test_bombs_and_broken_bodies_are_refused(client: TestClient, name: str) -> None:
    headers = {"content-encoding": name}
    assert client.post("/", content=PACK[name](bytes(LIMIT + 1)), headers=headers).status_code == 413
    assert client.post("/", content=PACK[name](bytes(50 * LIMIT)), headers=headers).status_code == 413
    for broken in (PACK[name](b"hello hello hello")[:-3], b"garbage", PACK[name](os.urandom(9000))[:5000]):
        reply = client.post("/", content=broken, headers=headers)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "content-encoding"


def test_plain_bodies_are_counted(client: TestClient) -> None:
    assert client.post("/", content=bytes(LIMIT)).text == f"{LIMIT} None"
    assert client.post("/", content=bytes(LIMIT + 1)).status_code == 413
    assert client.post("/", content=(bytes(LIMIT // 4) for _ in range(5))).status_code == 413
    assert client.post("/", content=b"x", headers={"content-encoding": "br"}).json()["error"]["code"] == "unsupported"


class Line:
    """A client that writes `pieces` with `wait` seconds before each, and hears what is answered."""

    def __init__(self, pieces: list[bytes], tenant: str = "a", wait: float = 0.0, told: bool = False):
        self.pieces, self.wait, self.taken = pieces, wait, 0
        headers = [(b"tenant", tenant.encode()), *([(b"content-length", str(sum(map(len, pieces))).encode())] if told else [])]
        self.scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "query_string": b""}
        self.heard: list[Message] = []

    async def receive(self) -> Message:
        await asyncio.sleep(self.wait)
        self.taken += 1
        return {"type": "http.request", "body": self.pieces[self.taken - 1], "more_body": self.taken < len(self.pieces)}

    async def send(self, message: Message) -> None:
        self.heard.append(message)

    @property
    def status(self) -> int:
        return int(self.heard[0]["status"])


async def admit(scope: Scope) -> str:
    tenant = dict(scope["headers"])[b"tenant"].decode()
    if not tenant:
        raise Unauthenticated("no key")
    return tenant


async def ok(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await PlainTextResponse("ok")(scope, receive, send)


def test_who_is_refused_has_no_byte_kept() -> None:
    class Watched(BodyLimit):
        async def read(self, *args: Any) -> bytes | None:
            raise AssertionError("the body of nobody was read")

    line = Line([bytes(1000)] * 5, tenant="")
    limit = Watched(ok, LIMIT, admit)
    asyncio.run(limit(line.scope, line.receive, line.send))
    assert line.status == 401 and line.taken == 5  # read and dropped, so that the client hears the refusal
    assert limit.room.total == 0


def test_a_body_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PATIENCE", 1.0)
    line = Line([b"x"] * 100, wait=0.02)
    limit = BodyLimit(ok, LIMIT, admit)
    asyncio.run(limit(line.scope, line.receive, line.send))
    assert line.status == 503 and line.taken >= 5 and not limit.room.total and not limit.room.held


def test_bodies_in_memory_are_bounded_and_every_tenant_has_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ROOM_SECONDS", 0.2)
    large = [bytes(LIMIT)]

    async def go() -> None:
        inside, leave = asyncio.Semaphore(0), asyncio.Event()

        async def stays(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            inside.release()
            await leave.wait()
            await PlainTextResponse("ok")(scope, receive, send)

        limit = BodyLimit(stays, LIMIT, admit)
        tasks: list[asyncio.Task[None]] = []

        async def comes(*lines: Line) -> None:
            tasks.extend(asyncio.create_task(limit(line.scope, line.receive, line.send)) for line in lines)
            for _ in lines:
                await inside.acquire()

        many = [Line(large, told=number % 2 == 0) for number in range(HELD_BODIES)]
        await comes(*many)
        assert limit.room.total == HELD_BODIES * LIMIT
        for told in (True, False):  # with a Content-Length, and without
            more = Line(large, told=told)
            await limit(more.scope, more.receive, more.send)
            assert more.status == 429 and more.heard
        others = [Line(large, "b") for _ in range(2)]
        await comes(*others)
        polls = [Line([bytes(200)]), Line([bytes(200)], "b")]
        await comes(*polls)  # whoever has filled the room may still ask for answers
        monkeypatch.setattr(limits, "ROOM_SECONDS", 30.0)
        waits = Line(large, told=True)
        tasks.append(asyncio.create_task(limit(waits.scope, waits.receive, waits.send)))
        await asyncio.sleep(0.05)
        assert not waits.taken
        leave.set()
        await asyncio.gather(*tasks)
        assert [line.status for line in (*many, *others, *polls, waits)] == [200] * (HELD_BODIES + 5)
        assert not limit.room.total and not limit.room.held

    asyncio.run(go())


def test_the_end_of_a_body_that_crosses_the_limit_is_told() -> None:
    told: list[bytes] = []

    async def tell(scope: Scope, ends: limits.Ends, error: EverlearnError) -> None:
        told.append(ends.tail)

    line = Line([bytes(LIMIT), b"the end"])
    limit = BodyLimit(ok, LIMIT, admit, tell)
    asyncio.run(limit(line.scope, line.receive, line.send))
    assert line.status == 413 and told[0].endswith(b"the end") and not limit.room.total
