"""Bodies: counted while they are read, after decompression; packed and broken ones."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator

import pytest
import zstandard
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from everlearn.api.limits import BodyLimit

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
