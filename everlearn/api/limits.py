"""How much a request may bring: bodies are counted after decompression, while they are read, before anything parses them.

The middleware reads the whole body (every route needs it whole), inflates zstd and gzip with a ceiling, and hands it on in one
piece. A body over the limit is a 413 and never exists in memory as a whole. It knows nothing of routes.
"""

from __future__ import annotations

import asyncio
import io
import zlib

import zstandard
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from everlearn.api.errors import error_response
from everlearn.errors import EverlearnError, InvalidRequest, TooLarge, Unsupported

PIECE = 1024
# After a refusal the rest of a body is read and dropped up to here, because a client that is still writing would see a broken
# connection instead of the 413.
DRAIN_BYTES = 256 << 20


class BodyLimit:
    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        more = True  # whether the client may still be writing

        async def counted() -> Message:
            nonlocal more
            message = await receive()
            more = bool(message.get("more_body"))
            return message

        try:
            body = await self.read(headers, counted)
            if body is None:
                return None  # the client has gone
            if encoding := headers.get(b"content-encoding", b"").decode("latin-1").strip().lower():
                body = await self.inflate(encoding, body)
                scope["headers"] = [(k, v) for k, v in scope["headers"] if k not in (b"content-encoding", b"content-length")]
        except EverlearnError as error:
            if more:
                await self.drain(receive)
            status = 413 if isinstance(error, TooLarge) else 400
            return await error_response(status, error.code, error.message, error.param, {"connection": "close"})(scope, receive, send)
        await self.app(scope, replay(body, receive), send)
        return None

    async def read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            raise self.too_large(f"{int(length):,} bytes")
        pieces, total = [], 0
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

    async def drain(self, receive: Receive) -> None:
        dropped = 0
        try:
            async with asyncio.timeout(10):
                while dropped < DRAIN_BYTES:
                    message = await receive()
                    dropped += len(message.get("body", b""))
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
