"""How much a request may bring: bodies are counted after decompression, while they are read, before anything parses them.

The middleware reads the whole body (every route needs it whole), inflates zstd and gzip with a ceiling, and hands it on in one
piece. A body over the limit is a 413 and never exists in memory as a whole. It knows nothing of routes: whom a refusal concerns
besides its client is told what the body began and ended with.
"""

from __future__ import annotations

import asyncio
import io
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import zstandard
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from everlearn.api.errors import error_response
from everlearn.errors import EverlearnError, InvalidRequest, TooLarge, Unsupported

PIECE = 1024
# After a refusal the rest of a body is read and dropped up to here, because a client that is still writing would see a broken
# connection instead of the 413.
DRAIN_BYTES = 256 << 20
# A zstd frame gives out its first bytes when its first block is there, which may take 128 KiB.
HEAD_BYTES, TAIL_BYTES = 192 << 10, 2 << 10


@dataclass
class Ends:
    """What a refused body began and ended with, as it came over the wire."""

    head: bytes = b""
    tail: bytes = b""

    def add(self, piece: bytes) -> None:
        self.head += piece[: HEAD_BYTES - len(self.head)]
        self.tail = (self.tail + piece[-TAIL_BYTES:])[-TAIL_BYTES:]


OnRefusal = Callable[[Scope, Ends, EverlearnError], Awaitable[None]]


async def nobody_else(scope: Scope, ends: Ends, error: EverlearnError) -> None:
    """The refusal concerns its client alone."""


class BodyLimit:
    def __init__(self, app: ASGIApp, max_bytes: int, on_refusal: OnRefusal = nobody_else):
        self.app, self.max_bytes, self.on_refusal = app, max_bytes, on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        more = True  # whether the client may still be writing
        pieces: list[bytes] = []

        async def counted() -> Message:
            nonlocal more
            message = await receive()
            more = bool(message.get("more_body"))
            return message

        try:
            body = await self.read(headers, counted, pieces)
            if body is None:
                return None  # the client has gone
            if encoding := headers.get(b"content-encoding", b"").decode("latin-1").strip().lower():
                body = await self.inflate(encoding, body)
                scope["headers"] = [(k, v) for k, v in scope["headers"] if k not in (b"content-encoding", b"content-length")]
        except EverlearnError as error:
            ends = Ends()
            for piece in pieces:
                ends.add(piece)
            if more:
                await self.drain(receive, ends)
            await self.on_refusal(scope, ends, error)
            status = 413 if isinstance(error, TooLarge) else 400
            told = error_response(status, error.code, error.message, error.param, {"connection": "close"}, path=scope["path"])
            return await told(scope, receive, send)
        await self.app(scope, replay(body, receive), send)
        return None

    async def read(self, headers: dict[bytes, bytes], receive: Receive, pieces: list[bytes]) -> bytes | None:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            raise self.too_large(f"{int(length):,} bytes")
        total = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            total += len(pieces[-1])
            if total > self.max_bytes:
                raise self.too_large("more than that")
            if not message.get("more_body"):
                return b"".join(pieces)

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
