"""What each scope opens: every route of the app's own table, with a key for each scope and one without any."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from everlearn.api.app import create_app
from everlearn.store import keys, records, tables
from everlearn.store.db import open_database
from tests.api.test_keys import OPEN, routes, settings
from tests.store.test_records import record

# The longest prefix decides; "METHOD prefix" where methods differ. Each route must be found here.
WANTED = {
    "/openapi.json": "train sample read",
    "/api/v1/client/": "train sample read",
    "/api/v1/get_server_capabilities": "train sample read",
    "/api/v1/create_session": "train sample read",
    "/api/v1/session_heartbeat": "train sample read",
    "/api/v1/sessions/{session_id}/finish": "train sample read",
    "/api/v1/telemetry": "train sample read",
    "/api/v1/create_custom_loss": "train sample read",
    "/api/v1/auth/": "train sample read",
    "/api/v1/create_model": "train",
    "/api/v1/get_info": "train",
    "/api/v1/forward": "train",
    "/api/v1/optim_step": "train",
    "/api/v1/unload_model": "train",
    "/api/v1/save_weights": "train",
    "/api/v1/load_weights": "train",
    "/api/v1/copy_weights": "train",
    "/api/v1/create_sampling_session": "sample",
    "/api/v1/join_sampling_session": "sample",
    "/api/v1/samplers/": "sample",
    "/api/v1/asample": "sample",
    "/api/v1/retrieve_future": "train sample",
    "/api/v1/cancel_future": "train sample",
    "/api/v1/files/": "read train",
    "/api/v1/billing/": "read",
    "/api/v1/audit": "read",
    "/api/v1/sessions/search": "read",
    "/api/v1/training_runs": "read train",
    "POST /api/v1/training_runs": "train",
    "PUT /api/v1/training_runs": "train",
    "DELETE /api/v1/training_runs": "train",
    "/api/v1/checkpoints": "read train",
    "/api/v1/weights_info": "read train",
    "/api/v1/sessions": "read train",
    "PUT /api/v1/sessions/{session_id}/project": "train",
    "/v1/adapters": "train sample read",
    "POST /v1/adapters": "train",
    "DELETE /v1/adapters": "train",
    "/v1/capabilities": "train sample read",
    "/v1/deployments": "train sample read",
    "POST /v1/deployments": "train",
    "PATCH /v1/deployments": "train",
    "DELETE /v1/deployments": "train",
    "/v1/tokenize": "train sample read",
    "/v1/detokenize": "train sample read",
    "/v1/records": "read",
    "DELETE /v1/records": "sample",
    "/v1/usage": "read",
    "/v1/runs": "read train",
    "POST /v1/runs": "train",
    "/v1/memories": "read",
    "POST /v1/memories": "sample",
    "PATCH /v1/memories": "sample",
    "DELETE /v1/memories": "sample",
    "/v1/episodes": "read",
    "POST /v1/episodes": "sample",
    "DELETE /v1/episodes": "sample",
    "/v1/feedback": "read",
    "POST /v1/feedback": "sample",
    "PATCH /v1/feedback": "sample",
    "DELETE /v1/feedback": "sample",
    "/v1/reward-models": "train read",
    "POST /v1/reward-models": "train sample",
    "/v1/doubts": "train read",
    "/v1/datasets": "train read",
    "POST /v1/datasets": "train",
    "DELETE /v1/datasets": "train",
    "/v1/models": "train sample read",
    "/v1/": "sample",
    "/oai/api/v1/models": "train sample read",
    "/oai/api/v1/": "sample",
    "/anthropic/": "sample",
}


@pytest.fixture(scope="module")
def keyed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, dict[str, str]]]:
    """An app, and a key for each scope; "" has none."""
    given = settings(tmp_path_factory.mktemp("scoped"), tiny_model)
    db = open_database(given.store_url)
    made = {scope: db.write(lambda conn, scope=scope: keys.create(conn, "acme", scope, (scope,))).result()[1] for scope in keys.SCOPES}
    bare, made[""] = db.write(lambda conn: keys.create(conn, "acme", "bare", ("read",))).result()
    db.write(lambda conn: conn.execute(tables.keys.update().where(tables.keys.c.key_id == bare.key_id).values(scopes=[]))).result()
    db.close()
    with TestClient(create_app(given)) as client:
        yield client, made


def wanted(method: str, template: str) -> set[str]:
    for start in (f"{method} {template}", template):
        found = [prefix for prefix in WANTED if start.startswith(prefix)]
        if found:
            return set(WANTED[max(found, key=len)].split())
    raise AssertionError(f"no scope is written down here for {method} {template}")


def test_every_route_opens_to_its_scopes_and_to_no_other(keyed: tuple[TestClient, dict[str, str]]) -> None:
    client, made = keyed
    for method, template in routes(client):
        if template in OPEN or (method, template) == ("DELETE", "/api/v1/auth/apikey/me"):
            continue
        path = template.replace("{", "").replace("}", "").replace(":path", "")
        allowed = wanted(method, template) | {"admin"}
        for scope, secret in made.items():
            reply = client.request(method, path, headers={"x-api-key": secret})
            refused = reply.status_code == 403 and "scope" in reply.json()["error"]["message"]
            assert refused == (scope not in allowed), (method, template, scope, reply.status_code, reply.text[:200])
            assert reply.status_code != 401


def test_a_key_may_always_revoke_itself_but_needs_a_scope(keyed: tuple[TestClient, dict[str, str]]) -> None:
    client, made = keyed
    assert client.delete("/api/v1/auth/apikey/me", headers={"x-api-key": made[""]}).status_code == 403
    db = client.app.state.services.db  # type: ignore[attr-defined]
    _, secret = db.write(lambda conn: keys.create(conn, "acme", "short", ("sample",))).result()
    assert client.delete("/api/v1/auth/apikey/me", headers={"x-api-key": secret}).status_code == 204


def test_weights_of_others_need_a_key_that_reads(keyed: tuple[TestClient, dict[str, str]]) -> None:
    client, made = keyed
    body = {"source_path": "tinker://x:train:0/weights/a", "destination_project_id": "p", "weights_access_token": made["sample"]}
    reply = client.post("/api/v1/copy_weights", json=body, headers={"x-api-key": made["train"]})
    assert reply.status_code == 403 and "weights_access_token" in reply.text


def test_a_key_that_only_reads_deletes_no_record(keyed: tuple[TestClient, dict[str, str]]) -> None:
    client, made = keyed
    kept = record(tenant="acme", created_at=time.time(), record_id=records.new_id())
    client.app.state.services.records.add(kept)  # type: ignore[attr-defined]
    path = f"/v1/records/{kept.record_id}"
    for method, key, status in (("DELETE", "read", 403), ("DELETE", "train", 403), ("GET", "read", 200), ("GET", "sample", 403)):
        assert client.request(method, path, headers={"x-api-key": made[key]}).status_code == status
    assert client.delete(path, headers={"x-api-key": made["sample"]}).status_code == 204
    assert client.get(path, headers={"x-api-key": made["read"]}).status_code == 404
