"""Many requests to several named adapters at once: what each says depends on nothing but itself, and an adapter that trains on changes
no answer under way."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from tests.live import KEY, LiveServer

NAMES = ("support", "sales", "legal")
TEXT = "the quick brown fox jumps over the lazy dog. hello, world! what is the capital of france? "
WORDS = TEXT.split()
RULE = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 40}}, "required": ["a"], "additionalProperties": False}


def datum(first: int) -> types.Datum:
    tokens = [first + 7 * i % 90 for i in range(12)]
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * 11}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def step(trainer: Any, first: int = 20) -> None:
    trainer.forward_backward([datum(first), datum(first + 100)], "cross_entropy")
    trainer.optim_step(types.AdamParams(learning_rate=0.03)).result()


@pytest.fixture(scope="module")
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def trainers(server: LiveServer, http: httpx.Client) -> Iterator[dict[str, Any]]:
    """Three runs of their own ranks and layers; the first two checkpoints of each have names (crowd-support@1, crowd-support@2, ...)."""
    shapes: dict[str, dict[str, Any]] = {
        "support": {"rank": 4},
        "sales": {"rank": 8, "train_unembed": False},
        "legal": {"rank": 2, "train_mlp": False},
    }
    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        made = {}
        for place, (name, shape) in enumerate(shapes.items()):
            made[name] = trainer = service.create_lora_training_client(server.model, seed=place, **shape).result()
            for number in (1, 2):
                step(trainer, 20 + 30 * place)
                name_it(http, name, trainer.save_weights_for_sampler(f"crowd-{number}").result().path)
        yield made


def name_it(http: httpx.Client, name: str, path: str) -> str:
    made = http.post("/v1/adapters", json={"name": f"crowd-{name}", "path": path, "move": True}).json()
    return str(made["model"])


# -- a seed decides ----------------------------------------------------------------------------------------------------------


def crowd() -> list[tuple[str, dict[str, Any]]]:
    """32 requests: four dialects, half of them streamed, to the base model and six versions of three adapters, short and long."""
    models = ["tiny", *(f"crowd-{name}@{number}" for name in NAMES for number in (1, 2))]
    made = []
    for number in range(32):
        text = " ".join((WORDS * 8)[number : number + 1 + 29 * number % 97])
        body: dict[str, Any] = {"model": models[number % 7], "seed": 500 + number, "stream": number % 8 >= 4}
        messages, length = [{"role": "user", "content": text}], 40 + 31 * number % 140
        draw = [{}, {"top_p": 0.9, "presence_penalty": 0.6}, {"temperature": 0.7, "top_k": 50}, {"min_p": 0.02, "logit_bias": {"40": 2}}][
            number // 8
        ]
        match number % 4:
            case 0:
                shaped = {"structured_outputs": {"json": RULE}} if number >= 24 else {"ignore_eos": True}
                made.append(("/v1/chat/completions", {**body, **draw, **shaped, "messages": messages, "max_tokens": length}))
            case 1:
                made.append(("/v1/completions", {**body, **draw, "prompt": text, "max_tokens": length, "ignore_eos": True}))
            case 2:
                made.append(("/v1/responses", {**body, "input": text, "max_output_tokens": length, "temperature": 0.8}))
            case 3:
                made.append(("/anthropic/api/v1/messages", {**body, "messages": messages, "max_tokens": length, "temperature": 0.9}))
    return made


def drawn(http: httpx.Client, record: str) -> tuple[list[int], list[float], str]:
    """Token ids, log-probabilities and version as they were drawn."""
    told = http.get(f"/v1/records/{record}").raise_for_status().json()
    [choice] = told["content"]["choices"]
    return choice["token_ids"], choice["logprobs"], told["model"]


def batches(server: LiveServer, tokens: int) -> float:
    """Sampling steps so far that computed more than `tokens` tokens."""
    lines = [line for line in server.get("/metrics")[1].decode().splitlines() if line.startswith("vllm:iteration_tokens_total_bucket")]
    counts = {line.partition('le="')[2].partition('"')[0]: float(line.rpartition(" ")[2]) for line in lines}
    return counts["+Inf"] - counts[f"{float(tokens)}"]


def test_a_seed_decides_alone_and_among_32_of_all_adapters(server: LiveServer, http: httpx.Client, trainers: Any) -> None:
    requests = crowd()

    async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> str:
        async with client.stream("POST", path, json=body) as reply:
            said = (await reply.aread()).decode()
            assert reply.status_code == 200, said
            assert reply.headers["x-everlearn-version"] == body["model"] and said
            return reply.headers["x-everlearn-record"]

    async def together() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=httpx.Limits(max_connections=40)) as client:
            return list(await asyncio.gather(*(ask(client, *request) for request in requests)))

    async def one_by_one() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            return [await ask(client, *request) for request in requests]

    before = batches(server, 16)
    crowded = asyncio.run(together())
    time.sleep(1.2)  # the engine counts with its heartbeat
    assert batches(server, 16) - before >= 30, "they decoded together"
    texts = set()
    for (path, body), record, own in zip(requests, crowded, asyncio.run(one_by_one()), strict=True):
        (tokens, logprobs, version), (own_tokens, own_logprobs, _) = drawn(http, record), drawn(http, own)
        assert tokens == own_tokens and version == body["model"], (path, body)
        assert logprobs == pytest.approx(own_logprobs, abs=1e-4), (path, body)
        texts.add(tuple(tokens))
    assert len(texts) == 32


# -- while it trains ---------------------------------------------------------------------------------------------------------


def greedy(sampler: Any, tokens: list[int]) -> list[int]:
    params = types.SamplingParams(max_tokens=24, temperature=0, stop=[])
    return list(sampler.sample(types.ModelInput.from_ints(tokens), 1, params).result().sequences[0].tokens)


def test_named_versions_stay_while_an_inflight_sampler_follows(server: LiveServer, http: httpx.Client, trainers: Any) -> None:
    """One run is trained on three times while an answer is drawn: the answer keeps its version, the sampler has each step's weights."""
    trainer, prompt = trainers["support"], [40, 41, 42, 43]
    body = {"model": "crowd-support@2", "prompt": prompt, "max_tokens": 1000, "seed": 3, "ignore_eos": True}
    short = {**body, "max_tokens": 24, "temperature": 0}

    def tokens_of(model: str) -> list[int]:
        reply = http.post("/v1/completions", json={**short, "model": model}).raise_for_status()
        assert reply.headers["x-everlearn-version"] == model
        return drawn(http, reply.headers["x-everlearn-record"])[0]

    alone = drawn(http, http.post("/v1/completions", json=body).headers["x-everlearn-record"])
    follower = trainer.save_weights_and_get_sampling_client(kind="inflight").result()
    assert greedy(follower, prompt) == tokens_of("crowd-support@2"), "the same weights, by another road"
    under_way: dict[str, Any] = {}
    begun = threading.Event()

    def draw() -> None:
        with httpx.stream("POST", server.url + "/v1/completions", json={**body, "stream": True}, timeout=120) as reply:
            for line in reply.iter_lines():
                begun.set()
                if line.startswith("data: {"):
                    assert json.loads(line[6:])["model"] == "crowd-support@2"
            under_way["record"], under_way["end"] = reply.headers["x-everlearn-record"], time.monotonic()

    drawing = threading.Thread(target=draw)
    drawing.start()
    assert begun.wait(60)
    seen = [tokens_of("crowd-support@2")]
    for number in (3, 4, 5):
        step(trainer)
        trainer.save_weights_and_get_sampling_client(kind="inflight").result()
        followed = greedy(follower, prompt)
        if number == 3:
            under_way["first"] = time.monotonic()
        model = name_it(http, "support", trainer.save_weights_for_sampler(f"crowd-{number}").result().path)
        assert model == f"crowd-support@{number}" and tokens_of(model) == followed
        seen.append(followed)
    drawing.join()
    assert under_way["first"] < under_way["end"], "newer weights answered while the older ones did"
    assert drawn(http, under_way["record"])[:2] == (alone[0], pytest.approx(alone[1], abs=1e-4))
    assert tokens_of("crowd-support@2") == seen[0] and len({tuple(one) for one in seen}) == 4
