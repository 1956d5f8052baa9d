"""Rough company: clients that vanish in every way at any moment, an engine that is killed under load, three times too much work."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.live import AT_ONCE, LiveServer

HI: list[Any] = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog"}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 300, "ignore_eos": True}
SCHEMA = {"type": "object", "properties": {"lines": {"type": "array", "items": {"type": "string"}, "minItems": 30}}, "required": ["lines"]}
HELD = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "everlearn_live_requests",
    "everlearn_sampling_compiling",
)
AWAY = "the engine is away"
SHORT = {**CHAT, "max_tokens": 24}


def sample(server: LiveServer, name: str) -> float:
    """The sum of a metric's samples."""
    lines = server.get("/metrics")[1].decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + "{", name + " ")))


def held(server: LiveServer) -> dict[str, float]:
    """The gauges of what live requests hold, those that aren't 0."""
    found = {name: sample(server, name) for name in HELD}
    return {name: value for name, value in found.items() if value}


def until(condition: Callable[[], bool], seconds: float, what: Callable[[], object]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what()}"
        time.sleep(0.02)


# -- clients that go ---------------------------------------------------------------------------------------------------------


def asked(number: int) -> tuple[str, dict[str, Any]]:
    """A route and a body: all routes that hold a connection, with long prompts, several choices and grammars among them."""
    prompt = "hello, world! " * (1 + 7 * number % 40)
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {**CHAT, "n": 1 + number % 3}),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": prompt}]}),
        ("/v1/chat/completions", {**CHAT, "structured_outputs": {"json": {**SCHEMA, "title": str(number)}}}),
        ("/v1/completions", {"model": "tiny", "prompt": [prompt, "paris"], "max_tokens": 300, "ignore_eos": True}),
        ("/v1/responses", {"model": "tiny", "input": prompt, "max_output_tokens": 300}),
    ]
    path, body = kinds[number // 4 % len(kinds)]
    return path, {**body, "stream": number % 2 == 0}


async def vanish(url: str, number: int, rng: random.Random) -> None:
    """Sends a request, reads for a while and goes: with a FIN, or with a reset as a killed process does. Some go while they still write."""
    path, body = asked(number)
    data = json.dumps(body).encode()
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    if number % 4 >= 2:
        own: socket.socket = writer.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    head = f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + (data[: len(data) // 2] if number % 25 == 0 else data))
    try:
        async with asyncio.timeout(rng.choice([0.001, 0.02, 0.1, 0.4]) * rng.uniform(0.5, 1.5)):
            while await reader.read(4096):
                pass
    except (TimeoutError, ConnectionError):
        pass
    writer.transport.abort() if number % 4 >= 2 else writer.close()


def test_100_clients_that_go_leave_nothing(server: LiveServer) -> None:
    rng = random.Random(3)

    async def all_of_them() -> None:
        for first in range(0, 100, 20):
            await asyncio.gather(*(vanish(server.url, number, rng) for number in range(first, first + 20)))

    asyncio.run(all_of_them())
    until(lambda: not held(server), 30.0, lambda: held(server))
    assert httpx.post(server.url + "/v1/chat/completions", json=SHORT, timeout=30).status_code == 200


# -- an engine that is killed ------------------------------------------------------------------------------------------------


def test_a_killed_engine_is_told_within_two_seconds_and_nobody_is_left_alone(new_server: Callable[..., LiveServer]) -> None:
    """Answers go on with the next engine; where it takes longer than clients are held, they are told."""
    server = new_server()
    bodies = [{**CHAT, "seed": number, "stream": number % 2 == 0} for number in range(8)]

    async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            data = (await reply.aread()).decode()
        if reply.status_code != 200:
            return AWAY if AWAY in data else data
        if not body["stream"]:
            return json.loads(data)["choices"][0]["message"]["content"]
        if not data.endswith("data: [DONE]\n\n"):
            return AWAY if AWAY in data.splitlines()[-2] else data
        chunks = [json.loads(line[6:]) for line in data.splitlines() if line.startswith("data: {")]
        return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)

    async def all_of_them(kill: bool) -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            asking = asyncio.gather(*(ask(client, body) for body in bodies))
            if kill:
                await asyncio.sleep(0.3)
                pid = server.engine_pid()
                server.kill_engine()
                started, reply = time.monotonic(), await client.get("/readyz")
                while reply.status_code == 200:
                    assert time.monotonic() - started < AT_ONCE, "a dead engine must be told"
                    reply = await client.get("/readyz")
                assert f"pid {pid}" in reply.json()["reason"] and "SIGKILL" in reply.json()["reason"]
                assert int(reply.headers["retry-after"]) >= 1
            return list(await asking)

    disturbed, undisturbed = asyncio.run(all_of_them(kill=True)), asyncio.run(all_of_them(kill=False))
    assert all(text in (alone, AWAY) for text, alone in zip(disturbed, undisturbed, strict=True)), disturbed
    assert server.get("/readyz")[0] == 200


# -- too much work -----------------------------------------------------------------------------------------------------------


async def offer(server: LiveServer, rate: float, seconds: float) -> Counter[str]:
    """Requests at a steady rate, whether or not they are answered; what became of each within 30 s."""
    ends: Counter[str] = Counter()

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        reply = await client.post("/v1/chat/completions", json={**SHORT, "seed": number})
        if reply.status_code == 200:
            assert reply.json()["usage"]["completion_tokens"] == SHORT["max_tokens"]
        else:
            assert reply.status_code == 429, reply.text
            assert int(reply.headers["retry-after"]) >= 1 and reply.json()["error"]["type"] == "rate_limit_error", reply.text
        ends[str(reply.status_code)] += 1

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    async with asyncio.timeout(seconds + 30), httpx.AsyncClient(base_url=server.url, timeout=30, limits=limits) as client:
        async with asyncio.TaskGroup() as tasks:
            due = time.monotonic()
            for number in range(int(rate * seconds)):
                tasks.create_task(ask(client, number))
                due += 1 / rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
    return ends


async def capacity(server: LiveServer, at_once: int, seconds: float) -> float:
    """Requests a second with `at_once` clients, each of which asks again when it is answered."""
    number, deadline = 0, time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:

        async def ask() -> None:
            nonlocal number
            while time.monotonic() < deadline:
                number += 1
                (await client.post("/v1/chat/completions", json={**SHORT, "seed": -number})).raise_for_status()

        await asyncio.gather(*(ask() for _ in range(at_once)))
    return number / seconds


def test_three_times_too_much_work_is_answered_or_refused_and_never_hangs(new_server: Callable[..., LiveServer]) -> None:
    server = new_server(**{"engine.max_batch": 8, "api.live_queue": 8})
    asyncio.run(capacity(server, 8, 1.0))
    rate = asyncio.run(capacity(server, 8, 3.0))
    ends = asyncio.run(offer(server, 3 * rate, 5.0))
    assert set(ends) == {"200", "429"}, ends
    assert ends["200"] > 32, f"{ends}: twice as many as run and wait at least, {5 * rate:.0f} were possible"
    assert sample(server, "vllm:admission_rejections_total") == ends["429"]
    until(lambda: not held(server), 30.0, lambda: held(server))
