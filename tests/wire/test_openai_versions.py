"""Which weights answer, and that nothing but the request decides what they say: seeds in a crowd, names that move, fresh snapshots."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import tinker
from tinker import types

from tests.live import AT_ONCE, KEY, LiveServer

HI: list[Any] = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NUM_VERSIONS = 8


def datum(first: int) -> types.Datum:
    tokens = [first + 7 * i % 90 for i in range(12)]
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * 11}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


@pytest.fixture(scope="module")
def trainer(server: LiveServer) -> Iterator[Any]:
    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        yield service.create_lora_training_client(server.model, rank=4, seed=1).result()


@pytest.fixture(scope="module")
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=120) as client:
        yield client


def step(trainer: Any) -> None:
    trainer.forward_backward([datum(20), datum(120)], "cross_entropy")
    trainer.optim_step(types.AdamParams(learning_rate=0.03)).result()


@pytest.fixture(scope="module")
def name(trainer: Any, http: httpx.Client) -> str:
    """`helpdesk`, which has eight versions, one of each training step, and means the seventh."""
    for number in range(1, NUM_VERSIONS + 1):
        step(trainer)
        path = trainer.save_weights_for_sampler(f"helpdesk-{number}").result().path
        made = http.post("/v1/adapters", json={"name": "helpdesk", "path": path}).json()
        assert made["number"] == number
    move(http, 7)
    return "helpdesk"


def move(http: httpx.Client, number: int) -> None:
    assert http.post("/v1/adapters/helpdesk/move", json={"number": number}).json()["number"] == number


def drawn(http: httpx.Client, answer: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
    """Token ids and log-probabilities of each choice, as they were drawn."""
    content = http.get(f"/v1/records/{answer['everlearn']['record']}").json()["content"]
    return [(choice["token_ids"], choice["logprobs"]) for choice in content["choices"]]


# -- a seed decides ----------------------------------------------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {},
    {"presence_penalty": 1.2, "frequency_penalty": 0.4, "temperature": 0.8},
    {"min_p": 0.02, "top_k": 200, "repetition_penalty": 1.3},
    {"logit_bias": {"40": 3, "41": -100, "90": 5}, "top_p": 0.9},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}},
    {"n": 3, "min_p": 0.01, "presence_penalty": 0.5, "structured_outputs": {"regex": "[a-z ]{12,40}"}},
    {"temperature": 0, "frequency_penalty": 0.7},
    {"stop": ["e"], "min_tokens": 4, "logit_bias": {"2": 4}},
]


def crowd(name: str) -> list[dict[str, Any]]:
    """32 requests of every kind, to the base model and four versions of an adapter, with prompts of different lengths."""
    models = ["tiny", f"{name}@1", f"{name}@4", f"{name}@7", f"{name}@8"]
    return [
        {
            "model": models[number % len(models)],
            "messages": [{"role": "user", "content": "hello " * (1 + number * 5 % 23)}],
            "max_tokens": 24 + number,
            "seed": 1000 + number,
            **KINDS[number % len(KINDS)],
        }
        for number in range(32)
    ]


def test_a_seeded_request_is_the_same_alone_and_in_a_crowd(server: LiveServer, http: httpx.Client, name: str) -> None:
    requests = crowd(name)

    async def together() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            replies = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in requests))
            return [reply.raise_for_status().json() for reply in replies]

    answers = asyncio.run(together())
    assert [answer["model"] for answer in answers] == [body["model"] for body in requests]
    texts = set()
    for body, answer in zip(requests, answers, strict=True):
        alone = http.post("/v1/chat/completions", json=body).raise_for_status().json()
        for (tokens, logprobs), (own_tokens, own_logprobs) in zip(drawn(http, answer), drawn(http, alone), strict=True):
            assert tokens == own_tokens, body
            assert logprobs == pytest.approx(own_logprobs, abs=1e-4), body
        assert answer["choices"] == alone["choices"]
        texts.add(answer["choices"][0]["message"]["content"])
    assert len(texts) >= 30, "they are requests of different kinds"


# -- versions ----------------------------------------------------------------------------------------------------------------


def test_what_began_under_version_7_ends_under_version_7(http: httpx.Client, name: str, trainer: Any) -> None:
    """The name moves, and its run trains on, while the answer is drawn."""
    body = {"model": name, "messages": HI, "max_tokens": 300, "seed": 5, "ignore_eos": True}
    alone = http.post("/v1/chat/completions", json={**body, "model": "helpdesk@7"}).json()
    newer = http.post("/v1/chat/completions", json={**body, "model": "helpdesk@8"}).json()
    text, between = "", None
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
        assert reply.headers["x-everlearn-version"] == "helpdesk@7"
        for number, line in enumerate(line for line in reply.iter_lines() if line.startswith("data: {")):
            chunk = json.loads(line[6:])
            assert chunk["model"] == "helpdesk@7"
            text += chunk["choices"][0]["delta"].get("content") or ""
            if number == 5:
                move(http, 8)
                step(trainer)
                between = http.post("/v1/chat/completions", json=body)
        assert chunk["choices"][0]["finish_reason"] == "length"
    move(http, 7)
    assert text == alone["choices"][0]["message"]["content"]
    assert between is not None and between.headers["x-everlearn-version"] == between.json()["model"] == "helpdesk@8"
    assert between.json()["choices"] == newer["choices"] != alone["choices"]
    assert between.json()["system_fingerprint"] != alone["system_fingerprint"]


def test_a_snapshot_answers_at_once(http: httpx.Client, trainer: Any, server: LiveServer) -> None:
    """From the call that saves it to its first token, by path and by name; the best of three, because others use this machine too."""
    seconds: list[tuple[float, float]] = []
    texts = set()
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY) as client:
        for number in range(3):
            step(trainer)
            started = time.perf_counter()
            path = trainer.save_weights_for_sampler(f"fresh-{number}").result().path
            chunks = client.chat.completions.create(model=path, messages=HI, max_tokens=12, seed=1, stream=True)
            text = next(iter(chunks)).choices[0].delta.content or ""
            by_path = time.perf_counter() - started
            text += "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            made = http.post("/v1/adapters", json={"name": "fresh", "path": path, "move": True}).json()
            started = time.perf_counter()
            answer = client.chat.completions.create(model="fresh", messages=HI, max_tokens=12, seed=1)
            seconds.append((by_path, time.perf_counter() - started))
            assert answer.model == made["model"] == f"fresh@{number + 1}" and answer.choices[0].message.content == text
            texts.add(text)
    assert len(texts) == 3, "each snapshot has weights of its own"
    assert min(map(max, seconds)) < AT_ONCE, seconds
