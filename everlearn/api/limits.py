"""How much a request may bring: bodies are counted after decompression, while they are read, before anything parses them.

The middleware asks whose the request is before it takes a byte, reads the whole body (every route needs it whole), inflates zstd and
gzip with a ceiling, and hands it on in one piece. A body over the limit is a 413 and never exists in memory as a whole; one that
comes too slowly is given up. All bodies share a room until they are answered (what a route makes of one is about as large), and every
tenant has its part of it; a large body waits for its place a while, a small one never: polls and heartbeats must pass. It knows nothing
of routes: whom a refusal concerns besides its client is told what the body began and ended with.
"""

from __future__ import annotations

import asyncio
import io
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import zstandard
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from everlearn.api.errors import on_everlearn_error
from everlearn.api.room import Room
from everlearn.errors import EverlearnError, InvalidRequest, Overloaded, TooLarge, Unavailable, Unsupported

PIECE = 1024
# After a refusal the rest of a body is read and dropped up to here, because a client that is still writing would see a broken
# connection instead of the 413.
DRAIN_BYTES = 256 << 20
# A zstd frame gives out its first bytes when its first block is there, which may take 128 KiB.
HEAD_BYTES, TAIL_BYTES = 192 << 10, 2 << 10
# A body may take so many seconds, and one more for each so many bytes that came.
PATIENCE, PACE = 30.0, 64 << 10
HELD_BODIES = 8  # bodies of the largest size that may be in memory together
ROOM_SECONDS = 20.0  # how long a body waits for its place among them
SMALL = 64 << 10  # bodies up to here are counted and never refused
INFLATED_AT_ONCE = 4


@dataclass
class Ends:
    """What a refused body began and ended with, as it came over the wire."""

    head: bytes = b""
    tail: bytes = b""

    def add(self, piece: bytes) -> None:
        self.head += piece[: HEAD_BYTES - len(self.head)]
        self.tail = (self.tail + piece[-TAIL_BYTES:])[-TAIL_BYTES:]


OnRefusal = Callable[[Scope, Ends, EverlearnError], Awaitable[None]]


Admission = Callable[[Scope], Awaitable[str]]


async def anybody(scope: Scope) -> str:
    """All callers are one tenant."""
    return ""


async def nobody_else(scope: Scope, ends: Ends, error: EverlearnError) -> None:
    """The refusal concerns its client alone."""


class Held:
    """What one request's body has in memory: the pieces that came, or the whole that was made of them; and the place it takes."""

    def __init__(self, room: Room, tenant: str = ""):
        self.room, self.tenant, self.size = room, tenant, 0
        self.pieces: list[bytes] = []

    def fits(self, size: int) -> bool:
        """Whether it may take `size` bytes in all."""
        return size <= max(SMALL, self.size) or self.room.has(self.tenant, size - self.size)

    def resize(self, size: int) -> None:
        self.room.take(self.tenant, size - self.size)
        self.size = size

    def refusal(self) -> Overloaded:
        return Overloaded(
            f"{self.room.total:,} bytes of request bodies are in memory, {self.room.held[self.tenant]:,} of them yours (limit "
            f"{self.room.limit:,}: {HELD_BODIES} times api.max_body_bytes, in fair parts); send fewer at a time"
        )


class BodyLimit:
    """`admit` gives the request's tenant, or raises why its caller is refused."""

    def __init__(self, app: ASGIApp, max_bytes: int, admit: Admission = anybody, on_refusal: OnRefusal = nobody_else):
        self.app, self.max_bytes, self.admit, self.on_refusal = app, max_bytes, admit, on_refusal
        self.room = Room(HELD_BODIES * max_bytes)
        self.freed = asyncio.Event()  # set, and replaced, when a body leaves the room
        self.inflating = asyncio.Semaphore(INFLATED_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        held, more = Held(self.room), True  # whether the client may still be writing

        async def counted() -> Message:
            nonlocal more
            message = await receive()
            more = bool(message.get("more_body"))
            return message

        try:
            try:
                held.tenant = await self.admit(scope)
                body = await self.whole(scope, counted, held)
            except EverlearnError as error:
                ends = Ends()
                for piece in held.pieces:
                    ends.add(piece)
                self.free(held)
                if more:
                    await self.drain(receive, ends)
                await self.on_refusal(scope, ends, error)
                told = on_everlearn_error(Request(scope), error)
                told.headers["connection"] = "close"
                return await told(scope, receive, send)
            if body is not None:
                await self.app(scope, replay(body, receive), send)
        finally:
            self.free(held)
        return None

    async def make_room(self, held: Held, size: int) -> None:
        """Takes a place of `size` bytes in all, once there is one. Raises Overloaded where there is none for long."""
        try:
            async with asyncio.timeout(ROOM_SECONDS):
                while not held.fits(size):
                    await self.freed.wait()
        except TimeoutError:
            raise held.refusal() from None
        held.resize(size)

    def free(self, held: Held) -> None:
        held.pieces.clear()
        held.resize(0)
        self.freed.set()
        self.freed = asyncio.Event()

    async def whole(self, scope: Scope, receive: Receive, held: Held) -> bytes | None:
        """The body, inflated; None if the client has gone."""
        headers = dict(scope["headers"])
        body = await self.read(headers, receive, held)
        if body is None:
            return None
        if encoding := headers.get(b"content-encoding", b"").decode("latin-1").strip().lower():
            async with self.inflating:
                body = await self.inflate(encoding, body)
                await self.make_room(held, len(body))
            scope["headers"] = [(k, v) for k, v in scope["headers"] if k not in (b"content-encoding", b"content-length")]
        held.pieces.clear()
        return body

    async def read(self, headers: dict[bytes, bytes], receive: Receive, held: Held) -> bytes | None:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            raise self.too_large(f"{int(length):,} bytes")
        if length.isdigit():
            await self.make_room(held, int(length))  # all of it or nothing: bodies that each have half would wait for one another
        total, began = 0, asyncio.get_running_loop().time()
        while True:
            try:
                async with asyncio.timeout_at(began + PATIENCE + total / PACE):
                    message = await receive()
            except TimeoutError as error:
                raise Unavailable(
                    f"the request body came too slowly ({total:,} bytes); send it at {PACE:,} bytes a second or faster"
                ) from error
            if message["type"] == "http.disconnect":
                return None
            held.pieces.append(message.get("body", b""))
            total += len(held.pieces[-1])
            if total > self.max_bytes:
                raise self.too_large("more than that")
            if not held.fits(total):  # of a length that wasn't told
                raise held.refusal()
            held.resize(max(total, held.size))
            if not message.get("more_body"):
                return b"".join(held.pieces)

    async def inflate(self, encoding: str, body: bytes) -> bytes:
        if encoding == "identity":
            return body
        if encoding not in ("zstd", "gzip", "deflate"):
            raise Unsupported(f"Content-Encoding {encoding[:40]!r}: send identity, zstd or gzip", param="content-encoding")
        function = inflate_zstd if encoding == "zstd" else inflate_zlib
        try:
            # Small bodies are done before a thread would have started.
            inflated = function(body, self.max_bytes) if len(body) < 4096 else await asyncio.to_thread(function, body, self.max_bytes)
        except (zstandard.ZstdError, zlib.error, EOFError) as error:
            raise InvalidRequest(f"the body isn't valid {encoding}: {error}", param="content-encoding") from error
        if inflated is None:
            raise self.too_large("more than that after decompression")
        return inflated

    def too_large(self, what: str) -> TooLarge:
        return TooLarge(
            f"the request body is limited to {self.max_bytes:,} bytes (api.max_body_bytes); this one has {what}; send less at a time"
        )

    async def drain(self, receive: Receive, ends: Ends) -> None:
        dropped = 0
        try:
            async with asyncio.timeout(10):
                while dropped < DRAIN_BYTES:
                    message = await receive()
                    dropped += len(message.get("body", b""))
                    ends.add(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        return
        except TimeoutError:
            return


def inflate_zstd(body: bytes, max_bytes: int) -> bytes | None:
    """The inflated body; None if it is longer than `max_bytes`. The window is capped, so that a frame can't ask for gigabytes, and
    the frame goes in by small pieces: each can become 32,000 times as long."""
    inflater = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
    out = io.BytesIO()
    for start in range(0, len(body), PIECE):
        out.write(inflater.decompress(body[start : start + PIECE]))
        if out.tell() > max_bytes:
            return None
        if inflater.eof:
            break
    if not inflater.eof:
        raise EOFError("it ends too early")
    return out.getvalue()


def inflate_zlib(body: bytes, max_bytes: int) -> bytes | None:
    """gzip or zlib, told apart by the header; None if longer than `max_bytes`."""
    inflater = zlib.decompressobj(wbits=47)
    inflated = inflater.decompress(body, max_bytes + 1)
    if len(inflated) > max_bytes:
        return None
    if not inflater.eof:
        raise EOFError("it ends too early")
    return inflated


def inflated_head(encoding: str, head: bytes, enough: int) -> bytes:
    """The first bytes of what `head` is the compressed beginning of, as far as they can be had: at least `enough`, or all."""
    if encoding not in ("zstd", "gzip", "deflate"):
        return head
    out = b""
    try:
        if encoding != "zstd":
            return zlib.decompressobj(wbits=47).decompress(head, enough)
        inflater = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
        for start in range(0, len(head), PIECE):
            out += inflater.decompress(head[start : start + PIECE])
            if len(out) >= enough or inflater.eof:
                break
    except (zstandard.ZstdError, zlib.error):
        return out
    return out


def replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body once, then whatever the connection says (the disconnect)."""
    sent = False

    async def receive_again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
