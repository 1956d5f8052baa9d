"""What an agent asks a server and what it gets, on the way between its `openai` client and the wire.

A tape stands below the client, as the transport of its HTTP: agent code doesn't know of it. It puts the policy's name, sampling settings
and seeds into what is asked, and notes which records the answers left (docs/guides/records.md). Given what an earlier, interrupted episode
had said, it answers the same questions with the same answers, without the server, until a question is new.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx
import msgspec

from everlearn.rl.policy import seed_of

SEEDED = ("/chat/completions", "/completions")  # routes that take a seed
ROUTES = (*SEEDED, "/responses", "/messages")
DONE = b"\ndata: [DONE]"  # clients may read no further, and the end of the body is never seen
RECORD, VERSION = "x-everlearn-record", "x-everlearn-version"


class Said(msgspec.Struct, frozen=True):
    """A question and its answer, as text: what an episode needs to be continued elsewhere. `request` is as the agent sent it, its keys
    sorted; `answer` is a body, or the events of a stream; empty if the agent didn't hear it to its end."""

    route: str
    request: str
    answer: str
    content_type: str
    records: list[str]
    version: str


class Tape:
    """One episode's. `newest` says which model answers now; it and `sampling` go into every request in the place of the agent's own
    settings. `turns` bounds the requests."""

    def __init__(self, newest: Callable[[], str], sampling: Mapping[str, Any], turns: int, seed: int | None, begun: Sequence[Said] = ()):
        self.newest, self.sampling, self.turns, self.seed = newest, dict(sampling), turns, seed
        self.said: list[Said] = []
        self.replayed = 0  # how many of them are an earlier episode's
        self.asked = 0
        self.over = ""  # why nothing more is answered
        self._begun = list(begun)

    def question(self, request: httpx.Request, body: bytes) -> tuple[httpx.Request, Said | None, httpx.Response | None]:
        """What to send, what will have been said by it (None: it isn't the model that is asked), and the answer if it is known already."""
        route = next((route for route in ROUTES if request.url.path.endswith(route)), "")
        if self.over:
            return request, None, _refusal(self.over)
        if request.method != "POST" or not route:
            return request, None, None
        self.asked += 1
        if self.asked > self.turns:
            self.over = f"the episode was not over after {self.turns} requests; raise the limit, or let the agent end"
            return request, None, _refusal(self.over)
        asked = json.loads(body)
        said = Said(route, json.dumps(asked, sort_keys=True), "", "", [], "")
        for place, one in enumerate(self._begun):
            if (one.route, one.request) == (said.route, said.request) and one.answer:
                del self._begun[place]
                self.said.append(one)
                self.replayed += 1
                headers = {"content-type": one.content_type, RECORD: ",".join(one.records), VERSION: one.version}
                return request, None, httpx.Response(200, headers=headers, content=one.answer.encode(), request=request)
        sent = {**asked, **self.sampling, "model": self.newest()}
        if route in SEEDED and self.seed is not None:
            sent["seed"] = seed_of(self.seed, self.asked)
        headers = {name: value for name, value in request.headers.items() if name not in ("content-length", "accept-encoding")}
        new = httpx.Request(request.method, request.url, headers=headers, json=sent, extensions=request.extensions)
        return new, said, None

    def answered(self, said: Said, response: httpx.Response) -> Callable[[bytes], None]:
        """Notes that an answer begins, and which it is; what it gives takes the answer once it was heard to its end."""
        if response.status_code != 200 or RECORD not in response.headers:
            return lambda _: None
        named = msgspec.structs.replace(
            said,
            content_type=response.headers.get("content-type", ""),
            records=response.headers[RECORD].split(","),
            version=response.headers.get(VERSION, ""),
        )
        place = len(self.said)
        self.said.append(named)

        def heard(answer: bytes) -> None:
            self.said[place] = msgspec.structs.replace(named, answer=answer.decode())

        return heard


class Tap(httpx.AsyncBaseTransport):
    """For an asynchronous client."""

    def __init__(self, tape: Tape):
        self.tape, self.wire = tape, httpx.AsyncHTTPTransport(retries=1)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        sent, said, known = self.tape.question(request, await request.aread())
        if known is not None:
            return known
        response = await self.wire.handle_async_request(sent)
        if said is not None:
            assert isinstance(response.stream, httpx.AsyncByteStream)
            response.stream = _Heard(response.stream, self.tape.answered(said, response))
        return response

    async def aclose(self) -> None:
        await self.wire.aclose()


class BlockingTap(httpx.BaseTransport):
    """For a client whose calls block."""

    def __init__(self, tape: Tape):
        self.tape, self.wire = tape, httpx.HTTPTransport(retries=1)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        sent, said, known = self.tape.question(request, request.read())
        if known is not None:
            return known
        response = self.wire.handle_request(sent)
        if said is not None:
            assert isinstance(response.stream, httpx.SyncByteStream)
            response.stream = _HeardBlocking(response.stream, self.tape.answered(said, response))
        return response

    def close(self) -> None:
        self.wire.close()


class _Heard(httpx.AsyncByteStream):
    """A body on its way to the client, which is told to the tape when all of it was read."""

    def __init__(self, stream: httpx.AsyncByteStream, whole: Callable[[bytes], None]):
        self.stream, self.whole = stream, whole
        self.pieces: list[bytes] = []  # of all who read: a client that has enough reads the rest in a second go

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self.stream:
            self.pieces.append(piece)
            if DONE in b"".join(self.pieces[-2:]):
                self.whole(b"".join(self.pieces))
            yield piece
        self.whole(b"".join(self.pieces))

    async def aclose(self) -> None:
        await self.stream.aclose()


class _HeardBlocking(httpx.SyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream, whole: Callable[[bytes], None]):
        self.stream, self.whole = stream, whole
        self.pieces: list[bytes] = []  # of all who read: a client that has enough reads the rest in a second go

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.stream:
            self.pieces.append(piece)
            if DONE in b"".join(self.pieces[-2:]):
                self.whole(b"".join(self.pieces))
            yield piece
        self.whole(b"".join(self.pieces))

    def close(self) -> None:
        self.stream.close()


def _refusal(why: str) -> httpx.Response:
    """As the server itself refuses, so that no client tries again."""
    return httpx.Response(400, json={"error": {"message": why, "type": "invalid_request_error", "param": None, "code": "episode_over"}})
