"""What a tenant's own calls find: whose sessions a search shows, and what it refuses by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from everlearn.api.app import create_app
from everlearn.store import keys, runs
from everlearn.store.db import open_database
from tests.api.test_keys import settings


@pytest.fixture(scope="module")
def keyed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, dict[str, str]]]:
    """An app, and a key of each of two tenants, each of which has a session."""
    given = settings(tmp_path_factory.mktemp("account"), tiny_model)
    db = open_database(given.store_url)
    made = {tenant: db.write(lambda conn, tenant=tenant: keys.create(conn, tenant, "x")).result()[1] for tenant in ("acme", "other")}
    db.close()
    with TestClient(create_app(given)) as client:
        for tenant, key in made.items():
            body = {"sdk_version": "0.38.0", "display_name": f"of {tenant}", "user_metadata": {"n": 1}}
            assert client.post("/api/v1/create_session", json=body, headers={"x-api-key": key}).status_code == 200
        yield client, made


def search(keyed: tuple[TestClient, dict[str, str]], **body: Any) -> Any:
    client, made = keyed
    return client.post("/api/v1/sessions/search", json=body, headers={"x-api-key": made["acme"]})


@pytest.mark.parametrize(
    ("owner", "found"),
    [
        (None, 1),
        ({"type": "own"}, 1),
        ({"type": "accessible"}, 1),
        ({"type": "user", "owner_urns": ["acme"]}, 1),
        ({"type": "user", "owner_urns": ["nobody", "acme"]}, 1),
        ({"type": "user", "owner_urns": ["other"]}, 0),
    ],
)
def test_whose_sessions_are_shown(keyed: tuple[TestClient, dict[str, str]], owner: Any, found: int) -> None:
    reply = search(keyed, owner=owner)
    assert reply.status_code == 200, reply.text
    assert [(item["owner"], item["display_name"]) for item in reply.json()["sessions"]] == [("acme", "of acme")] * found


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"owner": {"type": "everybody"}}, "owner.type"),
        ({"owner": {"type": "user"}}, "owner.owner_urns"),
        ({"owner": {"type": "user", "owner_urns": ["a"] * 11}}, "owner.owner_urns"),
        ({"owner": {"type": "own", "owner_urns": ["other"]}}, "owner.owner_urns"),
        ({"owner": {"type": "own", "colour": "red"}}, "owner.colour"),
        ({"limit": 201}, "limit"),
        ({"statuses": [{"type": "asleep"}]}, "statuses"),
        ({"statuses": [{"type": "client_finished", "reasons": ["x"] * 1_000}]}, "statuses"),
        ({"display_name": "a " * 2_000}, "display_name"),
        ({"project_ids": ["p"] * 40_000}, "project_ids"),
        ({"user_metadata": {str(i): "x" for i in range(2_000)}}, "user_metadata"),
        ({"cursor": {"last_created_at": "now", "last_session_id": ""}}, "cursor"),
    ],
)
def test_what_a_search_does_not_take_is_named(keyed: tuple[TestClient, dict[str, str]], body: Any, param: str) -> None:
    reply = search(keyed, **body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tags": ["x" * 2**20] * 48}, "tags[0]"),
        ({"tags": ["x"] * 65}, "tags"),
        ({"sdk_version": "x" * 513}, "sdk_version"),
        ({"project_id": "x" * 513}, "project_id"),
        ({"display_name": "x" * 2**20}, "display_name"),
        ({"user_metadata": {"k": "x" * 2**17}}, "user_metadata"),
    ],
)
def test_what_a_session_may_carry_is_bounded(keyed: tuple[TestClient, dict[str, str]], body: Any, param: str) -> None:
    client, made = keyed
    headers, before = {"x-api-key": made["acme"]}, stored(client)
    reply = client.post("/api/v1/create_session", json={"sdk_version": "0.38.0", "tags": []} | body, headers=headers)
    assert (reply.status_code, reply.json()["error"]["param"]) == (413 if param == "user_metadata" else 400, param), reply.text[:500]
    assert stored(client) == before and len(reply.content) < 1_000


def test_so_is_what_comes_later(keyed: tuple[TestClient, dict[str, str]]) -> None:
    client, made = keyed
    headers = {"x-api-key": made["acme"]}
    long = headers | {"x-idempotency-key": "k" * 600}
    most = {"sdk_version": "0.38.0", "tags": ["t" * 256] * 64, "display_name": "n" * 512, "project_id": "p" * 512}
    assert client.post("/api/v1/create_session", json=most, headers=long).json()["error"]["param"] == "x-idempotency-key"
    session = client.post("/api/v1/create_session", json=most, headers=headers).json()["session_id"]
    moved = client.put(f"/api/v1/sessions/{session}/project", json={"project_id": "p" * 513}, headers=headers)
    assert moved.status_code == 400 and moved.json()["error"]["param"] == "project_id"
    ended = {"reason": {"type": "errored"}, "detail": "d" * 2**20}
    reply = client.post(f"/api/v1/sessions/{session}/finish", json=ended, headers=headers)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "detail"
    assert client.post(f"/api/v1/sessions/{session}/finish", json=ended | {"detail": "d" * 16_384}, headers=headers).status_code == 204


def stored(client: TestClient) -> int:
    db = client.app.state.services.db  # type: ignore[attr-defined]
    return len(db.read(lambda conn: runs.list_sessions(conn, "acme", 1_000))[0])
