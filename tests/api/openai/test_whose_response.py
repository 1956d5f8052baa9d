"""A kept response is there for the key that made it and for those that may read records; to other keys of its tenant it doesn't exist."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from everlearn.api.app import create_app
from everlearn.store import keys, records
from everlearn.store.db import open_database
from tests.api.test_keys import settings
from tests.store.test_records import record

Made = tuple[TestClient, dict[str, dict[str, str]], dict[str, str]]


@pytest.fixture(scope="module")
def app(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """An app, headers of keys by name, and responses that "mine" made: one to look at, and one for each key to delete."""
    given = settings(tmp_path_factory.mktemp("whose"), tiny_model)
    db = open_database(given.store_url)
    scopes = {"mine": ("sample",), "other": ("sample",), "reader": ("sample", "read"), "owner": ("admin",)}
    made = {name: db.write(lambda conn, name=name: keys.create(conn, "acme", name, scopes[name])).result() for name in scopes}
    made["stranger"] = db.write(lambda conn: keys.create(conn, "b", "stranger")).result()
    answers = {}
    for number, name in enumerate(["shown", *made]):
        one = record(number, tenant="acme", key_id=made["mine"][0].key_id, route="responses", params={"model": "tiny"}, metadata=None)
        db.write(lambda conn, one=one: records.write(conn, [records.pack(records.draft(one))])).result()
        answers[name] = one.record_id.replace("rec_", "resp_")
    db.close()
    with TestClient(create_app(given)) as client:
        yield client, {name: {"x-api-key": secret} for name, (_, secret) in made.items()}, answers


@pytest.mark.parametrize(("name", "status"), [("other", 404), ("stranger", 404), ("mine", 200), ("reader", 200), ("owner", 200)])
def test_who_sees_a_response(app: Made, name: str, status: int) -> None:
    client, headers, answers = app
    mine, theirs = answers["shown"], answers[name]
    for prefix in ("/v1", "/oai/api/v1"):
        reply = client.get(f"{prefix}/responses/{mine}", headers=headers[name])
        assert reply.status_code == status, reply.text
        if status == 200:
            assert reply.json()["output"][0]["content"][0]["text"] == "yes"
        else:
            missing = client.get(f"{prefix}/responses/{mine[:-1]}", headers=headers[name])
            assert missing.json()["error"]["message"].replace(mine[:-1], mine) == reply.json()["error"]["message"], (
                "it is as if it weren't there"
            )
    follow = client.post("/v1/responses", headers=headers[name], json={"model": "tiny", "input": "and?", "previous_response_id": mine})
    refused = follow.status_code == 400 and follow.json()["error"]["code"] == "previous_response_not_found"
    assert refused == (status == 404), follow.text
    assert client.delete(f"/v1/responses/{theirs}", headers=headers[name]).status_code == status
    there = client.get(f"/v1/responses/{theirs}", headers=headers["owner"]).status_code
    assert there == (200 if status == 404 else 404)
