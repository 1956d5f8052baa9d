"""Who may ask what: every route of the app's own table, with each kind of wrong key."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from starlette.routing import Route

from everlearn.api import auth
from everlearn.api.app import create_app
from everlearn.config import Settings
from everlearn.store import keys
from everlearn.store.db import open_database

OPEN = {"/livez", "/readyz", "/health", "/metrics", "/api/v1/healthz"}


def settings(home: Path, model: Path) -> Settings:
    return Settings.model_validate({"home": home, "models": {"default": "tiny", "base": [{"name": "tiny", "path": str(model)}]}})


@pytest.fixture(scope="module")
def locked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, str, str]]:
    """An app whose store has a live key and a revoked one (the engine needn't be ready for any of this)."""
    given = settings(tmp_path_factory.mktemp("locked"), tiny_model)
    db = open_database(given.store_url)
    _, secret = db.write(lambda conn: keys.create(conn, "acme", "live")).result()
    revoked, old = db.write(lambda conn: keys.create(conn, "acme", "old")).result()
    db.write(lambda conn: keys.revoke(conn, revoked.key_id)).result()
    db.close()
    with TestClient(create_app(given)) as client:
        yield client, secret, old


def routes(client: TestClient) -> list[tuple[str, str]]:
    app = client.app
    found = [(method, route.path) for route in app.routes if isinstance(route, Route) for method in sorted(route.methods or ())]  # type: ignore[attr-defined]
    if not any(path.startswith("/api/v1/") for _, path in found):
        found += [(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods]  # type: ignore[attr-defined]
    assert len(found) > 30
    return found


def test_every_route_but_the_health_ones_wants_a_key(locked: tuple[TestClient, str, str]) -> None:
    client, _, old = locked
    for method, template in routes(client):
        path = template.replace("{", "").replace("}", "").replace(":path", "")
        if template in OPEN:
            assert client.request(method, path).status_code in (200, 503), template
            continue
        for headers in (
            {},
            {"x-api-key": "tml-wrong"},
            {"x-api-key": old},
            {"authorization": "Bearer tml-wrong"},
            {"authorization": "Basic x"},
        ):
            reply = client.request(method, path, headers=headers)
            assert reply.status_code == 401, (method, template, headers, reply.text)
            if method != "HEAD":
                assert reply.json()["error"]["code"] == "unauthenticated"


def test_a_live_key_works_in_both_headers(locked: tuple[TestClient, str, str]) -> None:
    client, secret, _ = locked
    for headers in ({"x-api-key": secret}, {"authorization": f"Bearer {secret}"}):
        assert client.get("/openapi.json", headers=headers).status_code == 200


def test_a_signed_link_stands_for_its_tenant_until_it_expires(locked: tuple[TestClient, str, str]) -> None:
    client, _, _ = locked
    svc = client.app.state.services  # type: ignore[attr-defined]
    path = "/api/v1/files/sess-1:train:0/weights/one/adapter.safetensors"
    good, late = auth.signed_url(svc, path, "acme", 60), auth.signed_url(svc, path, "acme", -60)
    assert client.get(good).status_code == 404  # let in; there is no such checkpoint
    assert client.get(late).status_code == 401
    assert client.get(good.replace("tenant=acme", "tenant=other")).status_code == 401
    assert client.get(good.replace("/one/", "/two/")).status_code == 401
    for broken in ("signature=%C3%A9", "signature=%FF", f"expires={'9' * 4400}", "expires=%C2%B2", "expires=-1"):
        name = broken.partition("=")[0]
        assert client.get(re.sub(f"{name}=[^&]*", broken, good)).status_code == 401, broken


def test_a_secret_that_was_cut_short_signs_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    secret = auth.signing_secret(home)
    assert len(secret) == 32 and auth.signing_secret(home) == secret
    path = home / "signing.secret"
    assert path.stat().st_mode & 0o777 == 0o600 and list(home.iterdir()) == [path]
    for left in (b"", secret[:31]):  # what a full disk leaves
        path.write_bytes(left)
        made = auth.signing_secret(home)
        assert len(made) == 32 and not made.startswith(secret[:31]) and path.stat().st_mode & 0o777 == 0o600


def test_a_body_is_not_read_for_a_wrong_key(locked: tuple[TestClient, str, str]) -> None:
    client, secret, _ = locked
    large = bytes(2**20)
    for headers in ({}, {"x-api-key": "tml-wrong"}):
        assert client.post("/api/v1/client/config", content=large, headers=headers).status_code == 401
        assert client.post("/no/such/route", content=large, headers=headers).status_code == 401
    assert client.post("/no/such/route", content=large, headers={"x-api-key": secret}).status_code == 404


def test_a_revoked_key_ends_within_a_moment(locked: tuple[TestClient, str, str]) -> None:
    client, _, _ = locked
    db = client.app.state.services.db  # type: ignore[attr-defined]
    key, secret = db.write(lambda conn: keys.create(conn, "acme", "short")).result()
    assert client.get("/openapi.json", headers={"x-api-key": secret}).status_code == 200
    db.write(lambda conn: keys.revoke(conn, key.key_id)).result()
    time.sleep(auth.CACHE_SECONDS + 0.1)
    assert client.get("/openapi.json", headers={"x-api-key": secret}).status_code == 401


def test_without_keys_only_this_machine_is_answered(tiny_model: Path, tmp_path: Path) -> None:
    with TestClient(create_app(settings(tmp_path, tiny_model))) as client:
        assert client.get("/openapi.json").status_code == 200
        assert client.get("/openapi.json", headers={"x-api-key": "tml-any"}).status_code == 200
        assert client.get("/openapi.json", headers={"origin": "https://evil.example"}).status_code == 403
        assert client.get("/openapi.json", headers={"origin": "null"}).status_code == 403
        assert client.get("/openapi.json", headers={"origin": "http://localhost:3000"}).status_code == 200
        for host in ("rebound.example", "[::1", "localhost.evil.example"):
            assert client.get("/openapi.json", headers={"host": host}).status_code == 403
        far = TestClient(client.app, client=("203.0.113.9", 4000))
        assert far.get("/openapi.json").status_code == 401
        assert far.get("/livez").status_code == 200
