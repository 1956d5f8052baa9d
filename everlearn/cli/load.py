"""A load on a server that speaks OpenAI's API, and what each request saw of it. Knows nothing of the terminal.

Closed loop: `concurrency` clients, each sends its next request when the last one ended. Open loop (`rate`): requests arrive at random
(Poisson), whether or not the server keeps up, up to `concurrency` at once. Prompts are drawn from the seed, so two runs send the same.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place case week "
    "company system program question work government number night point home water room mother area money story fact month lot right study"
)


@dataclass(frozen=True)
class Load:
    """`prompt_words` and `output_tokens` are (least, most), drawn evenly. `shared_words` begin every prompt alike."""

    models: Sequence[str]
    requests: int
    concurrency: int
    rate: float | None = None
    prompt_words: tuple[int, int] = (64, 64)
    output_tokens: tuple[int, int] = (64, 64)
    shared_words: int = 0
    stream: bool = True
    temperature: float = 1.0
    ignore_eos: bool = True
    seed: int = 0
    timeout: float = 600.0


@dataclass
class Seen:
    """One request as its client saw it; times in seconds. `status` is the HTTP status, 0 where no answer came."""

    model: str
    sent: float
    status: int = 0
    error: str = ""
    first: float = 0.0
    seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.status == 200 and not self.error

    @property
    def per_token(self) -> float | None:
        """Mean seconds for a token after the first."""
        return (self.seconds - self.first) / (self.tokens - 1) if self.first and self.tokens > 1 else None


def bodies(load: Load) -> Iterator[dict[str, Any]]:
    """The requests of a load, the same ones for the same seed."""
    rng, known = random.Random(load.seed), WORDS.split()
    shared = " ".join(rng.choices(known, k=load.shared_words))
    for number in range(load.requests):
        words = " ".join(rng.choices(known, k=rng.randint(*load.prompt_words)))
        body: dict[str, Any] = {
            "model": load.models[number % len(load.models)],
            "messages": [{"role": "user", "content": f"{shared} {words}".strip()}],
            "max_tokens": rng.randint(*load.output_tokens),
            "temperature": load.temperature,
            "seed": rng.randrange(2**31),
            "stream": load.stream,
        }
        if load.stream:
            body["stream_options"] = {"include_usage": True}
        if load.ignore_eos:
            body["ignore_eos"] = True
        yield body


async def run(url: str, key: str, load: Load, progress: Any = None) -> tuple[list[Seen], float]:
    """What every request saw, and the seconds from the first request to the last answer. `progress(done)` after each."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=load.concurrency)
    seen: list[Seen] = []
    began = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=httpx.Timeout(load.timeout, connect=10.0)) as client:
        room = asyncio.Semaphore(load.concurrency)

        async def one(body: dict[str, Any]) -> None:
            try:
                seen.append(await send(client, body, began))
            finally:
                room.release()
            if progress is not None:
                progress(len(seen))

        async with asyncio.TaskGroup() as tasks:
            arrivals = random.Random(load.seed + 1)
            due = began
            for body in bodies(load):
                if load.rate:
                    due += arrivals.expovariate(load.rate)
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                await room.acquire()
                tasks.create_task(one(body))
    return seen, time.perf_counter() - began


async def send(client: httpx.AsyncClient, body: dict[str, Any], began: float) -> Seen:
    started = time.perf_counter()
    seen = Seen(body["model"], started - began)
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            seen.status = response.status_code
            if response.status_code != 200 or not body["stream"]:
                answer = json.loads(await response.aread() or b"{}")
                seen.error = (answer.get("error") or {}).get("code") or ("" if response.is_success else "error")
                count(seen, answer.get("usage"))
            else:
                await follow(seen, response, started)
    except (httpx.HTTPError, ValueError) as error:
        seen.error = type(error).__name__
    seen.seconds = time.perf_counter() - started
    return seen


async def follow(seen: Seen, response: httpx.Response, started: float) -> None:
    """Reads a stream to its end: when the first text came, and the gaps between the pieces."""
    last, done = 0.0, False
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        now = time.perf_counter()
        if line[5:].strip() == "[DONE]":
            done = True
            break
        event = json.loads(line[5:])
        if "error" in event:
            seen.error = event["error"].get("code") or "error"
        count(seen, event.get("usage"))
        if any((choice.get("delta") or {}).get(name) for choice in event.get("choices", ()) for name in ("content", "reasoning_content")):
            if not seen.first:
                seen.first = now - started
            else:
                seen.gaps.append(now - last)
            last = now
    if not done and not seen.error:
        seen.error = "cut off"


def count(seen: Seen, usage: dict[str, Any] | None) -> None:
    if usage:
        seen.prompt_tokens, seen.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        seen.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


# -- figures -----------------------------------------------------------------------------------------------------------------


def report(load: Load, seen: Sequence[Seen], seconds: float, ttft: float, tpot: float) -> dict[str, Any]:
    """Throughput, latencies, and goodput: the requests that had their first token within `ttft` seconds and the others at `tpot`
    seconds each, in the mean."""
    good = [item for item in seen if item.ok]
    met = [item for item in good if (not load.stream or item.first <= ttft) and (item.per_token or 0.0) <= tpot]
    tokens = sum(item.tokens for item in good)
    errors: dict[str, int] = {}
    for item in seen:
        if not item.ok:
            name = f"{item.status} {item.error}".strip()
            errors[name] = errors.get(name, 0) + 1
    return {
        "load": asdict(load),
        "seconds": round(seconds, 3),
        "requests": {"sent": len(seen), "ok": len(good), "errors": errors},
        "throughput": {
            "requests_per_second": round(len(good) / seconds, 3),
            "output_tokens_per_second": round(tokens / seconds, 2),
            "total_tokens_per_second": round((tokens + sum(item.prompt_tokens for item in good)) / seconds, 2),
        },
        "tokens": {
            "prompt": sum(item.prompt_tokens for item in good),
            "cached": sum(item.cached_tokens for item in good),
            "output": tokens,
        },
        "ttft_seconds": spread([item.first for item in good if item.first]),
        "tpot_seconds": spread([pace for item in good if (pace := item.per_token) is not None]),
        "gap_seconds": spread([gap for item in good for gap in item.gaps]),
        "request_seconds": spread([item.seconds for item in good]),
        "goodput": {
            "ttft_seconds": ttft,
            "tpot_seconds": tpot,
            "requests_per_second": round(len(met) / seconds, 3),
            "share": round(len(met) / len(seen), 4) if seen else 0.0,
        },
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, median, and the 90th and 99th percentile (the value that so many do not exceed)."""
    if not values:
        return None
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 5)

    return {"mean": round(sum(ordered) / len(ordered), 5), "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": round(ordered[-1], 5)}
