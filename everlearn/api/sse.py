"""Server-sent events: encoded bytes from a source to the client, with pings while nothing comes and an error event instead of a fake end.

Knows HTTP and nothing of models. Who writes events encodes them; here they are only sent. The connection is watched from before the
answer begins: `Watch` tells of a client that goes, streamed or not, and what was begun for it can be given up at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from everlearn.errors import EverlearnError, InternalError

log = logging.getLogger(__name__)

PING_SECONDS = 15.0
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
# A proxy that collects an answer before it passes it on would make a stream pointless.
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Watch:
    """Calls `gone` once when the client disconnects. The request's body must have been read."""

    def __init__(self, request: Request, gone: Callable[[], None]):
        self._task = asyncio.create_task(self._wait(request.receive, gone))

    @staticmethod
    async def _wait(receive: Receive, gone: Callable[[], None]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone()

    def stop(self) -> None:
        self._task.cancel()


class EventStream(Response):
    """`source` gives encoded events. `on_error` makes the event for an error after the headers, `on_end` is called whatever happens.
    `ping` is sent while nothing else is."""

    media_type = "text/event-stream"

    def __init__(
        self,
        source: AsyncIterator[bytes],
        headers: Mapping[str, str],
        on_error: Callable[[EverlearnError], bytes],
        on_end: Callable[[], None],
        ping: bytes = PING,
    ):
        super().__init__(headers={**HEADERS, **headers}, media_type=self.media_type)
        del self.headers["content-length"]
        self.source, self.on_error, self.on_end, self.ping = source, on_error, on_end, ping
        self._sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._sent = loop.time()
        pings = asyncio.create_task(self._ping(send))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for data in self.source:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    self._sent = loop.time()
            except EverlearnError as error:
                await send({"type": "http.response.body", "body": self.on_error(error), "more_body": True})
            except Exception as error:  # the answer has begun: a fault of ours can only be told in it
                log.error("a stream failed", exc_info=error)
                told = InternalError(f"a fault of the server ({type(error).__name__}); its log has the details under this request id")
                await send({"type": "http.response.body", "body": self.on_error(told), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            pings.cancel()
            self.on_end()

    async def _ping(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            wait = self._sent + PING_SECONDS - loop.time()
            if wait > 0:
                await asyncio.sleep(wait)
            else:
                self._sent = loop.time()
                await send({"type": "http.response.body", "body": self.ping, "more_body": True})


def data(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"
