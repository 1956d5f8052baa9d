"""Chats as a load: requests to /v1/chat/completions, and a client so lean that it doesn't take the server's processors.

An SDK parses every chunk; with 32 streams on two cores that would be a large part of what is measured. This client reads bytes, notes
when they came, and looks into them only for the first text, the usage and an error. It knows nothing of models or of what is compared.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

FIRST_TEXT = re.compile(rb'"content":"[^"]')
COUNTS = {name: re.compile(rb'"%b":(\d+)' % name.encode()) for name in ("prompt_tokens", "completion_tokens", "cached_tokens")}
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place case week "
    "company system program question work government number night point home water room mother area money story fact month lot right study"
)
TIMEOUT = 120.0  # a request without an answer for so long hangs


@dataclass
class Answer:
    """What a client saw; times in seconds after it sent. `first` is that of the first text, 0 where the answer came in one piece."""

    status: int
    seconds: float = 0.0
    first: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    retry_after: int = 0
    error: str = ""
    times: list[float] = field(default_factory=list)  # of each piece with text

    @property
    def ok(self) -> bool:
        return self.status == 200 and not self.error

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


class Client:
    """One connection, kept open between requests."""

    def __init__(self, url: str):
        place = urlsplit(url)
        self.host, self.port = place.hostname or "", place.port or 80
        self.head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {place.netloc}\r\nauthorization: Bearer tml-benchmark\r\n"
            "content-type: application/json\r\ncontent-length: "
        ).encode()
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def chat(self, body: dict[str, Any]) -> Answer:
        data = json.dumps(body).encode()
        started = time.perf_counter()
        answer = Answer(0)
        try:
            async with asyncio.timeout(TIMEOUT):
                if self.writer is None:
                    self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
                self.writer.write(b"%b%d\r\n\r\n%b" % (self.head, len(data), data))
                await self._read(answer, started)
        except TimeoutError:
            answer.error = "hangs"
            self.close()
        except (OSError, EOFError) as error:
            answer.error = type(error).__name__
            self.close()
        answer.seconds = time.perf_counter() - started
        return answer

    async def _read(self, answer: Answer, started: float) -> None:
        assert self.reader is not None
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        answer.status = int(head.split(None, 2)[1])
        if after := re.search(rb"retry-after: (\d+)", head):
            answer.retry_after = int(after[1])
        last = b""
        if b"transfer-encoding: chunked" not in head:
            length = re.search(rb"content-length: (\d+)", head)
            last = await self.reader.readexactly(int(length[1]) if length else 0)
        else:
            while size := int(await self.reader.readline(), 16):
                piece = (await self.reader.readexactly(size + 2))[:-2]
                last = (last + piece)[-4096:]
                if FIRST_TEXT.search(piece):
                    answer.times.append(time.perf_counter() - started)
            await self.reader.readline()
        answer.first = answer.times[0] if answer.times else 0.0
        for name, pattern in COUNTS.items():
            if found := pattern.findall(last):
                setattr(answer, name, int(found[-1]))
        if answer.status != 200 or b'data: {"error"' in last:
            answer.error = last[-300:].decode("utf-8", "replace")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


# ---- loads ----


async def closed(url: str, bodies: Sequence[dict[str, Any]], at_once: int) -> list[Answer]:
    """`at_once` clients, each of which sends its next request when it has its answer."""
    left = iter(bodies)

    async def keep_on() -> list[Answer]:
        client = Client(url)
        answers = [await client.chat(body) for body in left]
        client.close()
        return answers

    return [answer for answers in await asyncio.gather(*(keep_on() for _ in range(at_once))) for answer in answers]


async def arriving(url: str, bodies: Iterable[dict[str, Any]], rate: float) -> list[Answer]:
    """Requests at random moments (Poisson), `rate` a second in the mean, whether or not the server keeps up."""
    idle: list[Client] = []
    rng = random.Random(0)

    async def send(body: dict[str, Any]) -> Answer:
        client = idle.pop() if idle else Client(url)
        answer = await client.chat(body)
        idle.append(client)
        return answer

    due, tasks = time.perf_counter(), []
    for body in bodies:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(send(body)))
        due += rng.expovariate(rate)
    answers = await asyncio.gather(*tasks)
    for client in idle:
        client.close()
    return list(answers)


class Talk:
    """Makes requests: always fresh prompts, because a prefix that is served from the cache would flatter."""

    def __init__(self, model: str, stream: bool = True, seed: int = 0):
        self.model, self.stream, self.rng = model, stream, random.Random(seed)

    def words(self, num: int) -> str:
        return " ".join(self.rng.choices(WORDS.split(), k=num))

    def body(self, num_words: int, max_tokens: int, **fields: Any) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": self.words(num_words)}],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "seed": self.rng.randrange(2**31),
            "stream": self.stream,
        }
        return body | ({"stream_options": {"include_usage": True}} if self.stream else {}) | fields

    def length(self, low: int, high: int) -> int:
        """Log-uniform, as lengths in conversations are."""
        return int(math.exp(self.rng.uniform(math.log(low), math.log(high))))


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def all_ok(answers: Sequence[Answer]) -> list[Answer]:
    """The same; a benchmark doesn't count what wasn't answered."""
    bad = next((answer for answer in answers if not answer.ok), None)
    if bad is not None:
        raise SystemExit(f"a request failed with {bad.status}: {bad.error}")
    return list(answers)


def tokens(answers: Sequence[Answer]) -> int:
    return sum(answer.completion_tokens for answer in answers)
