"""A hostile network: a TCP proxy before a server that delays, loses, cuts off and replaces answers, by a seed.

It understands just enough HTTP/1.1 to know where a request and an answer end; each request goes to the server on a connection of
its own. What happens to a request depends on the seed and on how many came before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from types import TracebackType
from urllib.parse import urlsplit

FAULTS = {
    "drop before": 0.04,  # the connection ends before the server hears of it
    "drop after": 0.10,  # the server has done it; its answer is lost
    "reset": 0.06,  # as above, with a TCP reset in the middle of the answer
    "408 after": 0.04,
    "502 after": 0.06,
    "502 before": 0.04,
    "delay": 0.10,
    "twice": 0.06,  # the request arrives twice, the second answer is passed on
}


class HostileProxy:
    """`url` is what the client gets; `faults` counts what was done to it. `calm()` ends the hostility."""

    def __init__(self, target: str, seed: int):
        address = urlsplit(target)
        assert address.hostname and address.port
        self.target = (address.hostname, address.port)
        self.random = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self.hostile = True
        self.loop = asyncio.new_event_loop()
        self.ready = threading.Event()
        self.port = 0
        self.thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> HostileProxy:
        self.thread.start()
        assert self.ready.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.loop.call_soon_threadsafe(self.stopped.set)
        self.thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._serve())
        self.loop.close()

    async def _serve(self) -> None:
        self.stopped = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=1 << 26)
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        await self.stopped.wait()
        server.close()
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._exchange(reader, writer):
                    pass
        finally:
            await closed(writer)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and what becomes of it; False when the connection is at its end."""
        head = await reader.readuntil(b"\r\n\r\n")
        request = head + await reader.readexactly(content_length(head))
        self.requests += 1
        fault = self._fault()
        self.faults[fault] += 1
        if fault == "drop before":
            return False
        if fault == "502 before":
            writer.write(made_up(502))
            return True
        if fault == "delay":
            await asyncio.sleep(self.random.uniform(0.1, 1.0))
        answer = await self._ask(request)
        if fault == "twice":
            answer = await self._ask(request)
        if fault == "drop after" or not answer:
            return False
        if fault == "reset":
            writer.write(answer[: len(answer) // 2])
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return False
        writer.write(made_up(int(fault[:3])) if fault in ("408 after", "502 after") else answer)
        await writer.drain()
        return fault in ("408 after", "502 after")  # the server closes its connection after each answer, and says so

    def _fault(self) -> str:
        draw = self.random.random()
        for name, share in FAULTS.items():
            if draw < share:
                return name if self.hostile else "none"
            draw -= share
        return "none"

    async def _ask(self, request: bytes) -> bytes:
        """The server's whole answer."""
        head, body = request.split(b"\r\n\r\n", 1)
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        try:
            reader, writer = await asyncio.open_connection(*self.target)
        except OSError:
            return b""
        writer.write(b"\r\n".join([*lines, b"connection: close"]) + b"\r\n\r\n" + body)
        try:
            with contextlib.suppress(ConnectionError):
                return await reader.read()
            return b""
        finally:
            await closed(writer)

    def calm(self) -> None:
        self.hostile = False


def content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
        assert name.lower() != b"transfer-encoding", "the SDK sends bodies whole"
    return 0


def made_up(status: int) -> bytes:
    """What a gateway between client and server says, without knowing anything."""
    return b"HTTP/1.1 %d Gateway\r\ncontent-type: text/html\r\ncontent-length: 13\r\n\r\n<h1>oops</h1>" % status


async def closed(writer: asyncio.StreamWriter) -> None:
    """Closes a connection and waits for that; what the other end did to it doesn't matter any more."""
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
