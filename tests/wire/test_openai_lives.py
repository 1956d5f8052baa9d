"""Live requests and what may happen to them: clients that go, engines that die, queues that are full, servers that end."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from tests.live import KEY, LiveServer

HI: list[Any] = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog"}]
# Stop tokens are switched off, so that an answer is as long as it is asked to be.
LONG: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 400, "ignore_eos": True, "seed": 7}


def gauge(server: LiveServer, name: str) -> float:
    text = server.get("/metrics")[1].decode()
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith((name + "{", name + " ")))


def settle(server: LiveServer, seconds: float = 30.0) -> dict[str, float]:
    """The gauges of what is held, once they are 0 or the time is over (a heartbeat comes each second)."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "everlearn_live_requests")
    deadline = time.monotonic() + seconds
    while True:
        found = {name: gauge(server, name) for name in names}
        if not any(found.values()) or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def events(reply: httpx.Response) -> list[Any]:
    return [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: ") and line != "data: [DONE]"]


def text(chunks: list[Any]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk.get("choices"))


def left(number: int) -> tuple[str, dict[str, Any]]:
    """A route of every dialect, streamed and not, and a body that takes longer than any of its clients wait."""
    path = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/anthropic/api/v1/messages")[number // 2 % 4]
    body: dict[str, Any] = {"model": "tiny", "seed": number, "stream": number % 2 == 0}
    match number // 2 % 4:
        case 0:
            body |= {"messages": HI, "max_tokens": 400, "ignore_eos": True, "n": 1 + number % 3}
        case 1:
            body |= {"prompt": "the quick brown fox " * (1 + number % 20), "max_tokens": 400, "ignore_eos": True}
        case 2:
            body |= {"input": "jumps over " * (1 + number % 30), "max_output_tokens": 400}
        case 3:
            body |= {"messages": HI, "max_tokens": 400}
    return path, body


def test_a_client_that_goes_frees_everything(new_server: Callable[..., LiveServer]) -> None:
    """100 disconnects at random moments, of every dialect, streamed and not, while they run and while they wait for their turn."""
    server = new_server(**{"engine.max_batch": 8})
    rng = random.Random(1)

    async def leave(client: httpx.AsyncClient, number: int) -> None:
        path, body = left(number)
        try:
            async with asyncio.timeout(rng.uniform(0.005, 0.6)):
                async with client.stream("POST", path, json=body) as reply:
                    assert reply.status_code == 200, await reply.aread()
                    async for _ in reply.aiter_bytes():
                        pass
        except TimeoutError:
            pass

    async def all_of_them() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=40)) as client:
            for first in range(0, 100, 20):
                await asyncio.gather(*(leave(client, number) for number in range(first, first + 20)))

    asyncio.run(all_of_them())
    held = settle(server)
    assert not any(held.values()), held
    assert gauge(server, "everlearn_live_requests_cancelled_total") > 20
    assert gauge(server, "vllm:generation_tokens_total") < 0.5 * 400 * 100, "what nobody waits for isn't drawn"
    for number in range(8):
        path, body = left(number)
        short = {name: 4 if name in ("max_tokens", "max_output_tokens") else value for name, value in body.items()}
        assert httpx.post(server.url + path, json=short, timeout=60).status_code == 200


def test_an_engine_that_dies_is_not_noticed_in_a_stream(new_server: Callable[..., LiveServer]) -> None:
    server = new_server()
    with httpx.Client(base_url=server.url, timeout=120) as client:
        alone = client.post("/v1/chat/completions", json=LONG).json()["choices"][0]["message"]["content"]
        answers: dict[str, Any] = {}

        def whole() -> None:
            with httpx.Client(base_url=server.url, timeout=120) as own:
                answers["whole"] = own.post("/v1/chat/completions", json=LONG).json()

        waiting = threading.Thread(target=whole)
        chunks: list[Any] = []
        with client.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    chunks.append(json.loads(line[6:]))
                if len(chunks) == 20:
                    waiting.start()
                    time.sleep(0.1)
                    server.kill_engine()
                    chunks.append({})
        waiting.join()
    assert text(chunks) == alone == answers["whole"]["choices"][0]["message"]["content"]
    assert gauge(server, "everlearn_engine_restarts_total") == 1


def test_a_full_queue_is_a_429_that_says_when_to_come_again(new_server: Callable[..., LiveServer]) -> None:
    server = new_server(**{"engine.max_batch": 2, "api.live_queue": 2})

    async def ask(client: openai.AsyncOpenAI) -> str:
        try:
            answer = await client.chat.completions.create(model="tiny", messages=HI, max_tokens=400, extra_body={"ignore_eos": True})
        except openai.RateLimitError as error:
            assert int(error.response.headers["retry-after"]) >= 1
            return "refused"
        return answer.choices[0].finish_reason

    async def all_of_them(retries: int) -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=retries) as client:
            return list(await asyncio.gather(*(ask(client) for _ in range(12))))

    ended = asyncio.run(all_of_them(0))
    assert ended.count("length") >= 4 and ended.count("refused") == 12 - ended.count("length") > 0
    # One request that is larger than the queue is not refused for ever.
    big = httpx.post(server.url + "/v1/chat/completions", json={**LONG, "max_tokens": 3, "n": 9}, timeout=60)
    assert big.status_code == 200 and len(big.json()["choices"]) == 9


def test_a_server_that_ends_finishes_what_it_began(new_server: Callable[..., LiveServer]) -> None:
    server = new_server(**{"api.shutdown_grace_seconds": 60.0})
    with httpx.Client(base_url=server.url, timeout=60) as client:
        with client.stream("POST", "/v1/chat/completions", json={**LONG, "max_tokens": 900, "stream": True}) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            while server.get("/readyz")[0] != 503:
                time.sleep(0.01)  # it answers until the stream ends
            assert httpx.post(server.url + "/v1/chat/completions", json=LONG).status_code == 503
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in rest[-3:]
    assert server.process.wait(30) == 0


def test_a_server_that_may_not_wait_tells_its_clients(new_server: Callable[..., LiveServer]) -> None:
    """An error after the first token is an event: never a fake end, and an exception in the SDK."""
    server = new_server(**{"api.shutdown_grace_seconds": 0.3})
    body = {**LONG, "max_tokens": 900}
    found: list[Any] = []

    def read() -> None:
        with httpx.stream("POST", server.url + "/v1/chat/completions", json={**body, "stream": True}, timeout=60) as reply:
            found.extend(line for line in reply.iter_lines() if line)

    reading = threading.Thread(target=read)
    reading.start()
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
        stream = client.chat.completions.create(model="tiny", messages=HI, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            for _ in stream:
                pass
    reading.join()
    assert json.loads(found[-1].removeprefix("data: "))["error"]["code"] == "unavailable" and "data: [DONE]" not in found
    assert server.process.wait(30) == 0


def test_metrics_have_the_names_that_dashboards_ask_for(server) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        client.post("/v1/chat/completions", json={**LONG, "max_tokens": 5})
        events(client.send(client.build_request("POST", "/v1/chat/completions", json={**LONG, "max_tokens": 5, "stream": True})))
    time.sleep(1.2)
    found = server.get("/metrics")[1].decode()
    for name in (
        "time_to_first_token_seconds_count", "inter_token_latency_seconds_bucket", "time_per_output_token_seconds_sum",
        "request_time_per_output_token_seconds_count", "e2e_request_latency_seconds_count", "num_requests_running", "num_requests_waiting",
        "kv_cache_usage_perc", "prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total",
        "num_preemptions_total", "request_prompt_tokens_sum", "request_generation_tokens_sum", "request_params_n_count",
        "request_params_max_tokens_count", "request_decode_time_seconds_count",
    ):  # fmt: skip
        assert re.search(rf'^vllm:{name}{{[^}}\n]*model_name="tiny"', found, re.M), name
    assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"}' in found
