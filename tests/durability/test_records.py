"""An answer that a client has seen has its record, whatever happens to the server in the moment after it."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from everlearn.store import tables
from everlearn.store.spool import Frame, framed
from tests.live import LiveServer

pytestmark = pytest.mark.timeout(600)

SAID = "Where is my parcel?"


def spooled(server: LiveServer) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((server.home / "spool").glob("*.spool")))


@pytest.fixture
def rows(store_url: str) -> Iterator[Any]:
    """A function that reads the ids of all records and the usage's number of requests, past the server."""
    engine = sa.create_engine(store_url)

    def read() -> tuple[set[str], int]:
        with engine.connect() as conn:
            requests = conn.execute(sa.select(sa.func.coalesce(sa.func.sum(tables.usage.c.requests), 0))).scalar_one()
            return set(conn.execute(sa.select(tables.records.c.record_id)).scalars()), requests

    yield read
    engine.dispose()


def kill_at_the_end(server: LiveServer, path: str, body: dict[str, Any], last: bytes) -> tuple[str, str]:
    """Sends a request over a bare socket and kills the server as soon as `last` has come; the record's id and the answer's text. No library
    stands between the last byte and the signal."""
    data = json.dumps(body).encode()
    host, port = "127.0.0.1", int(server.url.rsplit(":", 1)[1])
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((host, port), timeout=60) as connection:
        connection.sendall(head.encode() + data)
        got = b""
        while last not in got:
            piece = connection.recv(65536)
            assert piece, got
            got += piece
        os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    assert got.startswith(b"HTTP/1.1 200"), got
    (record_id,) = [line.split(b": ")[1].decode() for line in got.split(b"\r\n") if line.lower().startswith(b"x-everlearn-record: ")]
    return record_id, got.decode(errors="replace")


# Greedy: one answer in a hundred that is drawn is shorter.
ROADS = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": SAID}], "max_tokens": 8, "temperature": 0}, b'"system_fingerprint"'),
    "chat stream": ("/v1/chat/completions", {"messages": [{"role": "user", "content": SAID}], "max_tokens": 8, "temperature": 0, "stream": True}, b'"finish_reason":"'),
    "completion stream": ("/v1/completions", {"prompt": SAID, "max_tokens": 8, "temperature": 0, "stream": True}, b"[DONE]"),
    "response": ("/v1/responses", {"input": SAID, "max_output_tokens": 8, "temperature": 0}, b'"usage"'),
    "response stream": ("/v1/responses", {"input": SAID, "max_output_tokens": 8, "temperature": 0, "stream": True}, b"event: response.incomplete"),
}  # fmt: skip


def test_the_record_of_an_answer_survives_kill_9(new_server, store_url: str, rows) -> None:
    server = new_server(**{"store.url": store_url})
    known: set[str] = set()
    from_spool = 0
    for number, (road, (path, body, last)) in enumerate(ROADS.items()):
        record_id, _ = kill_at_the_end(server, path, {"model": server.model, **body}, last)
        before, _ = rows()
        from_spool += record_id not in before
        assert record_id in before or record_id.encode() in spooled(server), road
        known.add(record_id)
        if number == 2:  # the write that the kill interrupted
            with (server.home / "spool" / "99999999.spool").open("wb") as file:
                file.write(framed(Frame("rec_torn", b"x" * 1000))[:-1])
        server.restart()
        with httpx.Client(base_url=server.url, timeout=60) as client:
            found = client.get(f"/v1/records/{record_id}").raise_for_status().json()
        assert SAID in json.dumps(found["content"]["messages"]) and found["usage"]["completion_tokens"] == 8, road
        assert len(found["content"]["choices"][0]["logprobs"]) == 8
        there, requests = rows()
        assert there == known and requests == number + 1, road
    assert from_spool, "no kill came before the database had the record; the spool was not needed once"
    assert "and are dropped" in server.log.read_text()
    server.stop()
    assert server.process.returncode == 0 and list((server.home / "spool").iterdir()) == []


def test_many_answers_at_once(new_server, store_url: str, rows) -> None:
    """A burst of streams; the server is killed while some have ended and others go on."""
    server = new_server(**{"store.url": store_url})
    seen = burst(server, 24)
    assert len(seen) >= 4
    server.restart()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for record_id in seen:
            assert client.get(f"/v1/records/{record_id}").status_code == 200
    there, requests = rows()
    assert seen <= there and requests == len(there)


def burst(server: LiveServer, count: int) -> set[str]:
    """The records of those answers whose end came before the kill."""
    import asyncio

    seen: set[str] = set()

    async def one(client: httpx.AsyncClient, number: int) -> None:
        body = {"model": server.model, "messages": [{"role": "user", "content": SAID}], "max_tokens": 4 * (number + 1), "stream": True}
        async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    seen.add(reply.headers["x-everlearn-record"])
                    if len(seen) == 4:
                        os.kill(server.process.pid, signal.SIGKILL)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=count)) as client:
            await asyncio.gather(*(one(client, number) for number in range(count)), return_exceptions=True)

    asyncio.run(run())
    server.process.wait()
    return seen


def test_files_of_the_spool_are_private_and_short(new_server, tmp_path: Path) -> None:
    server = new_server()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for _ in range(3):
            reply = client.post("/v1/completions", json={"model": server.model, "prompt": SAID, "max_tokens": 2}).raise_for_status()
        client.get(f"/v1/records/{reply.headers['x-everlearn-record']}").raise_for_status()
    (file,) = (server.home / "spool").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and file.stat().st_size == 0
