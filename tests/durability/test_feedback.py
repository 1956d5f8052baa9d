"""Feedback under SIGKILL: what was acknowledged is there, nothing is there twice, and a dataset is whole or not there."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import httpx
import pytest

from everlearn.store.datasets import Draft, content_hash
from tests.live import LiveServer

pytestmark = pytest.mark.timeout(1800)
PATIENCE = 300.0


def insist(server: LiveServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """By a client that sends it again until it is answered."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            reply = httpx.post(server.url + path, json=body, timeout=60)
            if reply.status_code < 500:
                assert reply.status_code == 200, reply.text
                return dict(reply.json())
        except httpx.TransportError:
            pass
        assert time.monotonic() < until, "the server did not come back"
        time.sleep(0.05)


def harm(server: LiveServer, kills: int, seed: int) -> None:
    chat = {"model": server.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    ids = [httpx.post(server.url + "/v1/chat/completions", json=chat, timeout=120).headers["x-everlearn-record"] for _ in range(8)]
    said: dict[str, tuple[str, bool]] = {}  # feedback id -> (record, value), as acknowledged
    frozen: list[dict[str, Any]] = []
    over = threading.Event()

    def talk() -> None:
        rng, number = random.Random(seed), 0
        while not over.is_set():
            record_id, value = ids[rng.randrange(len(ids))], rng.random() < 0.5
            body = {"record_id": record_id, "kind": "boolean", "value": value, "idempotency_key": f"word-{number}"}
            body |= {"source_id": f"user {number}"}
            said[insist(server, "/v1/feedback", body)["id"]] = (record_id, value)
            if number % 10 == 9:
                frozen.append(insist(server, "/v1/datasets", {"name": f"d{number}", "form": "kto"}))
            number += 1

    talker = threading.Thread(target=talk)
    talker.start()
    rng = random.Random(seed + 1)
    try:
        for _ in range(kills):
            time.sleep(rng.uniform(0.1, 1.5))
            server.kill()
            server.restart()
    finally:
        over.set()
        talker.join()
    assert len(said) > 10 and frozen
    there: dict[str, Any] = {}
    after = None
    while True:
        page = httpx.get(server.url + "/v1/feedback", params={"limit": 500, **({"after": after} if after else {})}, timeout=60).json()
        there |= {one["id"]: one for one in page["data"]}
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert {known: (one["target"]["record_id"], one["value"]) for known, one in there.items()} == said
    assert all(one["counts"] for one in there.values())
    listed = httpx.get(server.url + "/v1/datasets", params={"limit": 1000}, timeout=60).json()["data"]
    assert {one["id"] for one in frozen} <= {one["id"] for one in listed}
    for one in listed:
        check_whole(server, one)


def check_whole(server: LiveServer, dataset: dict[str, Any]) -> None:
    """All items are there, and they are those that were hashed."""
    items = httpx.get(f"{server.url}/v1/datasets/{dataset['id']}/items", params={"limit": 1000}, timeout=60).json()["data"]
    assert len(items) == sum(dataset["items"].values())
    drafts = [Draft(item["split"], item["episode_id"], item["weight"], b"", item["sha256"], []) for item in items]
    assert content_hash(drafts) == dataset["content_hash"]


def test_acknowledged_feedback_outlives_kills(new_server: Any) -> None:
    harm(new_server(), kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_acknowledged_feedback_outlives_many_kills(new_server: Any, seed: int) -> None:
    harm(new_server(), kills=20, seed=seed)
