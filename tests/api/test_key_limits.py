"""Limits, scopes and records of keys, as the official client of OpenAI sees them on a real server; and what SIGTERM leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from everlearn.store import keys
from everlearn.store.db import open_database
from tests.live import LiveServer, start_server
from tests.wire.raw import Raw, batch, sample

HI = [{"role": "user", "content": "hello, world!"}]


def make_key(live: LiveServer, *scopes: str, content: bool = True, **limits: Any) -> str:
    """A key of the running server, made beside it as the command line does."""
    db = open_database(f"sqlite:///{live.home / 'everlearn.db'}")
    _, secret = db.write(lambda conn: keys.create(conn, "acme", "test", scopes or keys.SCOPES, keys.Limits(**limits), content)).result()
    db.close()
    return secret


@pytest.fixture(scope="module")
def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    server = start_server(tmp_path_factory.mktemp("limited"), tiny_model)
    make_key(server)
    time.sleep(1.1)  # until the server asks again whether there are keys
    yield server
    server.stop()


@pytest.fixture
def client(live: LiveServer) -> Iterator[Callable[..., openai.OpenAI]]:
    made: list[openai.OpenAI] = []

    def make(*scopes: str, **limits: Any) -> openai.OpenAI:
        made.append(openai.OpenAI(base_url=live.url + "/v1", api_key=make_key(live, *scopes, **limits), max_retries=0))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.with_raw_response.create(**{"model": "tiny", "messages": HI, "max_tokens": 4} | more)


def record_of(client: openai.OpenAI, record_id: str) -> dict[str, Any]:
    reply = httpx.get(f"{client.base_url}records/{record_id}", headers={"authorization": f"Bearer {client.api_key}"})
    assert reply.status_code == 200, reply.text
    return reply.json()  # type: ignore[no-any-return]


def test_requests_a_minute_end_in_a_rate_limit_error(client: Callable[..., openai.OpenAI]) -> None:
    one = client(rpm=2)
    headers = ask(one).headers
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("2", "1")
    ask(one)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(one)
    answer = caught.value.response
    assert 1 <= int(answer.headers["retry-after"]) <= 30 and answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert caught.value.code == "rate_limited" and "2 requests a minute" in caught.value.message
    ask(client(rpm=2))


def test_tokens_a_minute_count_what_was_used(client: Callable[..., openai.OpenAI]) -> None:
    one = client(tpm=2_000)
    first = ask(one, max_tokens=4)
    used = first.parse().usage.total_tokens
    left = int(ask(one, max_tokens=4).headers["x-ratelimit-remaining-tokens"])
    assert 2_000 - 3 * used - 50 <= left <= 2_000 - used
    stream = one.chat.completions.create(model="tiny", messages=HI, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 10  # 33 tokens come back each second, and a question takes about as many
    while int(ask(one, max_tokens=4).headers["x-ratelimit-remaining-tokens"]) < 1_500:
        assert time.monotonic() < deadline, "a request that was broken off keeps its share"
        time.sleep(0.5)


def test_requests_at_once(client: Callable[..., openai.OpenAI]) -> None:
    one = client(concurrency=1)
    stream = one.chat.completions.create(model="tiny", messages=HI, max_tokens=500, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    with pytest.raises(openai.RateLimitError, match="1 requests at once"):
        ask(one)
    stream.close()
    deadline = time.monotonic() + 30
    while True:
        try:
            ask(one)
            break
        except openai.RateLimitError:
            assert time.monotonic() < deadline, "a client that has gone keeps its place"
            time.sleep(0.02)


def test_samples_of_tinkers_api_are_requests_at_once_too(client: Callable[..., openai.OpenAI], live: LiveServer) -> None:
    """A sample holds its place from its acceptance to its answer, whether or not anyone fetches it; what was not drawn is given back."""
    one = client(concurrency=1, tpm=20_000)
    raw = Raw(live.url, "tiny", key=one.api_key)
    sampler = raw.sampler()
    body = {"sampling_session_id": sampler, "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 40, 41]}]}}
    long = body | {"seq_id": 0, "sampling_params": {"max_tokens": 900, "stop": []}}
    accepted = raw.ok("/asample", **long)
    assert raw.ok("/asample", **long)["request_id"] == accepted["request_id"], "the same again takes no second place"
    refusal = raw.post("/asample", **body | {"seq_id": 1, "sampling_params": {"max_tokens": 2}})
    assert refusal.status_code == 429 and "1 requests at once" in refusal.text and int(refusal.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError, match="1 requests at once"):
        ask(one)
    assert len(raw.result(accepted["request_id"])["sequences"]) == 1
    answer = ask(one)
    with one.chat.completions.create(model="tiny", messages=HI, max_tokens=500, stream=True, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        assert raw.post("/asample", **body | {"seq_id": 1, "sampling_params": {"max_tokens": 2}}).status_code == 429
    left = int(answer.headers["x-ratelimit-remaining-tokens"])
    assert left >= 20_000 - 2 * (3 + 900) - 200, "what was taken is settled by what was drawn"
    until = time.monotonic() + 30
    while raw.post("/asample", **body | {"seq_id": 1, "sampling_params": {"max_tokens": 2}}).status_code != 200:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_models(client: Callable[..., openai.OpenAI]) -> None:
    one = client(models=["support"])
    with pytest.raises(openai.PermissionDeniedError, match="may not use model 'tiny'") as caught:
        ask(one)
    assert caught.value.param == "model"
    ask(client(models=["Qwen/Qwen3-8B"]))


def test_models_of_tinkers_api(live: LiveServer) -> None:
    """The limit binds training as well: whoever may use other models alone creates no run, trains none that is there, samples none."""
    bound, free = Raw(live.url, "tiny", key=make_key(live, models=["support"])), Raw(live.url, "tiny", key=make_key(live))
    run, sampler = free.create(), free.sampler()
    saved = free.result(free.ok("/save_weights", model_id=run, seq_id=1, path="w")["request_id"])["path"]
    new, session = {"session_id": bound.session, "model_seq_id": 0}, {"session_id": bound.session, "sampling_session_seq_id": 0}
    adam = {"model_id": run, "adam_params": {"learning_rate": 1e-3}}
    asked = [
        ("/create_model", {**new, "base_model": "tiny", "lora_config": {"rank": 2}}),
        ("/create_model", {**new, "base_model": "Qwen/Qwen3-8B", "lora_config": {"rank": 2}}),
        ("/load_weights", {**new, "path": saved, "optimizer": False}),
        ("/load_weights", {"model_id": run, "seq_id": 2, "path": saved, "optimizer": False}),
        ("/optim_step", {**adam, "seq_id": 3}),
        ("/save_weights", {"model_id": run, "seq_id": 4, "path": "x"}),
        ("/save_weights_for_sampler", {"model_id": run, "seq_id": 5, "path": "y"}),
        ("/create_sampling_session", {**session, "base_model": "tiny"}),
        ("/create_sampling_session", {**session, "model_path": saved}),
        ("/asample", sample(sampler, 0)),
    ]
    for route, body in asked:
        reply = bound.post(route, **body)
        assert reply.status_code == 403 and "may not use model" in reply.text and "support" in reply.text, (route, reply.text)
    refused = bound.forward_backward(batch(run, 6).SerializeToString())
    assert refused.status_code == 403 and refused.json()["error"]["param"] == "model"
    free.result(free.ok("/optim_step", **adam, seq_id=7)["request_id"])  # the places of what was refused have passed
    allowed = Raw(live.url, "tiny", key=make_key(live, models=["Qwen/Qwen3-8B"]))
    other = allowed.create()
    allowed.result(allowed.ok("/optim_step", model_id=other, adam_params={"learning_rate": 1e-3}, seq_id=1)["request_id"])
    named = allowed.result(allowed.ok("/save_weights_for_sampler", model_id=other, seq_id=2, sampling_session_seq_id=4)["request_id"])
    allowed.result(allowed.ok("/asample", **sample(named["sampling_session_id"], 0))["request_id"])


def test_a_key_that_samples_reads_no_records(client: Callable[..., openai.OpenAI]) -> None:
    one, reader = client("sample"), client("read")
    record_id = ask(one).headers["x-everlearn-record"]
    reply = httpx.get(f"{one.base_url}records/{record_id}", headers={"authorization": f"Bearer {one.api_key}"})
    assert reply.status_code == 403
    assert record_of(reader, record_id)["content"]["messages"][0]["content"] == HI[0]["content"]
    with pytest.raises(openai.PermissionDeniedError):
        ask(reader)


def test_the_record_of_an_answer_is_what_was_sampled(client: Callable[..., openai.OpenAI]) -> None:
    one = client()
    raw = ask(one, n=2, max_tokens=6, logprobs=True, temperature=1.0, seed=3, user="u-1", metadata={"order": "7"})
    answer, record = raw.parse(), record_of(one, raw.headers["x-everlearn-record"])
    for choice, kept in zip(answer.choices, record["content"]["choices"], strict=True):
        shown = [item.logprob for item in choice.logprobs.content]
        assert len(kept["token_ids"]) == len(kept["logprobs"]) >= len(shown)
        assert kept["logprobs"][: len(shown)] == pytest.approx(shown, abs=1e-6)
    assert record["usage"]["completion_tokens"] == answer.usage.completion_tokens and record["model"] == "tiny"
    assert (record["user"], record["content"]["metadata"]) == ("u-1", {"order": "7"})
    assert len(record["content"]["prompt_token_ids"]) == answer.usage.prompt_tokens


def test_without_content_nobody_can_read_what_was_said(client: Callable[..., openai.OpenAI], live: LiveServer) -> None:
    one = client(content=False)
    secret = "pineapple-telescope"
    raw = ask(one, messages=[{"role": "user", "content": secret}], user=secret, metadata={"k": secret})
    record = record_of(one, raw.headers["x-everlearn-record"])
    assert record["content"] is None and record["usage"]["prompt_tokens"] > 0 and record["user"] is None
    db = open_database(f"sqlite:///{live.home / 'everlearn.db'}")
    db.close()
    for file in live.home.glob("everlearn.db*"):
        assert secret.encode() not in file.read_bytes()
    assert secret not in live.log.read_text()


def test_what_was_answered_is_recorded_when_the_server_ends(new_server: Callable[..., LiveServer]) -> None:
    live = new_server()
    ids = []
    with httpx.Client(base_url=live.url, timeout=60) as http:
        for number in range(10):
            body = {"model": "tiny", "messages": HI, "max_tokens": 2, "seed": number}
            ids.append(http.post("/v1/chat/completions", json=body).headers["x-everlearn-record"])
    live.stop()
    assert live.process.returncode == 0
    live.restart()
    with httpx.Client(base_url=live.url, timeout=60) as http:
        assert [http.get(f"/v1/records/{record_id}").status_code for record_id in ids] == [200] * 10


TOLD = "Nora paid {n} euros in Lisbon. It was a nice day. The bus was {n} minutes late, and nobody knew why."
BEHIND = {"budget": 300, "refill": "generate"}  # sentences enough to be cut, which a model writes anew behind the answer


def remembered(client: openai.OpenAI, memory: str, n: int) -> None:
    body = {"memory": {"id": memory, **BEHIND}}
    ask(client, messages=[{"role": "user", "content": TOLD.format(n=n)}], max_tokens=6, seed=1, extra_body=body)


def rewritten(client: openai.OpenAI, memory: str, wanted: str, seconds: float = 30.0) -> list[str]:
    """Who rewrote what in a memory, once it was `wanted`."""
    deadline = time.monotonic() + seconds
    with httpx.Client(base_url=str(client.base_url), headers={"authorization": f"Bearer {client.api_key}"}) as http:
        while True:
            turns = http.get(f"memories/{memory}/turns", params={"limit": 100}).json()["data"]
            found = [row["refill"] for turn in turns for row in http.get(f"memories/{memory}/turns/{turn['number']}").json()["rewrites"]]
            if any(row.startswith(wanted) for row in found):
                return found
            assert time.monotonic() < deadline, set(found)
            time.sleep(0.1)


def test_what_a_model_does_for_a_memory_is_its_key_s_use(client: Callable[..., openai.OpenAI]) -> None:
    """Also for a key that may have one request at once: what waits for nobody waits for its place."""
    one = client(rpm=5000, tpm=1_000_000, concurrency=1).with_options(max_retries=20)
    for n in range(14):
        remembered(one, "written", n)
    rewritten(one, "written", "generate")
    headers = {"authorization": f"Bearer {one.api_key}"}
    key_id = httpx.get(f"{one.base_url}records", params={"limit": 1}, headers=headers).json()["data"][0]["key_id"]
    deadline = time.monotonic() + 20
    while True:  # the line of the usage comes with the text; more orders of the last turns may be under way
        lines = httpx.get(f"{one.base_url}usage", headers=headers).json()["data"]
        used = {line["kind"]: line for line in lines if line["key_id"] == key_id}
        if "memory" in used:
            break
        assert time.monotonic() < deadline, lines
        time.sleep(0.2)
    memory = used["memory"]
    assert (
        memory["model"] == "tiny" and memory["requests"] >= 1 and memory["tokens_in"] > 50 * memory["requests"] and memory["tokens_out"] > 0
    )


def test_a_key_that_has_used_up_its_share_leaves_the_rules_text(client: Callable[..., openai.OpenAI]) -> None:
    """Each turn with a key of its own, whose only request a minute is the turn."""
    reader = client()
    for n in range(14):
        remembered(client(rpm=1), "left", n)
    found = rewritten(reader, "left", "generate failed (tiny): this key may use 1 requests a minute")
    assert not any(row.startswith("generate (tiny)") for row in found)
